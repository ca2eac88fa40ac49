"""Local and mutual steps with ``resources.compile`` against the same steps without, and how long compiling takes.

Plain and compiled steps take turns; the ratio is the median over the repeats. On a CPU it is the processor time of one
thread that counts, on a GPU the wall clock. Compiling is measured with an empty cache, as on a new machine.

    python -m benchmarks.compiled --workloads unet hippocampus retina lgg --repeats 7
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

from benchmarks.dcml import WEIGHT, seconds_of
from benchmarks.workloads import WORKLOADS, interleaved, make_batch, make_config, make_learner, make_loss, median_ratio
from gcml_ray.config import DcmlConfig
from gcml_ray.model.learner import local_step, mutual_step
from gcml_ray.training.cpu import keep_freed_memory


def steps_of(
    name: str, device: torch.device, *, amp: str, is_compiled: bool
) -> tuple[list[Callable[[], object]], float]:
    """A local and a mutual step of a workload, and the seconds that compiling took."""
    config = make_config(WORKLOADS[name], amp=amp, is_compiled=is_compiled)
    loss, batch = make_loss(config), make_batch(config, device)
    local, incoming = (make_learner(config, device, site=site) for site in "AB")
    began = time.perf_counter()
    if is_compiled:
        local.compile_ahead(tuple(batch.image.shape))
    seconds = time.perf_counter() - began

    def mutual() -> None:
        mutual_step(local, incoming, batch, loss, dcml=DcmlConfig(), weight=WEIGHT, sigmoid=config.data.is_sigmoid)

    return [lambda: local_step(local, batch, loss), mutual], seconds


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["unet", "hippocampus", "retina", "lgg"], choices=WORKLOADS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--amp", default="none", choices=("none", "bf16", "fp16"), help="on a GPU")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as sites do
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    amp = options.amp if device.type == "cuda" else "none"
    print("| network | device | step | plain, ms | compiled, ms | ratio | compiling, s |")
    print("|---|---|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as empty:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
        for name in options.workloads:
            plain, _ = steps_of(name, device, amp=amp, is_compiled=False)
            compiled, compiling_s = steps_of(name, device, amp=amp, is_compiled=True)
            for kind, one, other in zip(("local", "mutual"), plain, compiled, strict=True):
                calls = [lambda step=step: seconds_of(step, options.steps, device) for step in (one, other)]
                interleaved(calls, repeats=1)  # warm-up
                before, after = interleaved(calls, repeats=options.repeats)
                print(
                    f"| {name} | {device.type} | {kind} | {1e3 * statistics.median(before):.1f} "
                    f"| {1e3 * statistics.median(after):.1f} | {median_ratio(after, before):.2f} | {compiling_s:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
