"""A mutual step against two separate local steps of the same network: what mutual learning itself costs.

Both are measured in turn, several steps each, on a made-up batch; the ratio is the median over the repeats. On a CPU it
is the processor time of one thread that counts, on a GPU the wall clock.

    python -m benchmarks.dcml --workloads unet lgg sanet_small --repeats 7
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.workloads import WORKLOADS, interleaved, make_batch, make_config, make_learner, make_loss, median_ratio
from gcml_ray.config import DcmlConfig
from gcml_ray.model.learner import local_step, mutual_step
from gcml_ray.training.cpu import keep_freed_memory

WEIGHT = 0.1
VARIANTS = ("contrast", "contrast_soft")


@dataclass(frozen=True)
class Result:
    """Median seconds of two local steps and of a mutual step, and the median of their ratios."""

    two_local_s: float
    mutual_s: float
    ratio: float


def measure(name: str, device: torch.device, *, dcml: DcmlConfig, repeats: int, steps: int, amp: str) -> Result:
    """Times one workload.

    Args:
        name: a key of ``WORKLOADS``.
        device: where the steps run.
        dcml: variant and constants of the divergence.
        repeats: how often both are measured, in turn.
        steps: steps a measurement.
        amp: as ``resources.amp``; a CPU runs in full precision.
    """
    config = make_config(WORKLOADS[name], amp=amp)
    loss, batch = make_loss(config), make_batch(config, device)
    local, incoming = (make_learner(config, device, site=site) for site in "AB")

    def two_local() -> None:
        local_step(local, batch, loss)
        local_step(incoming, batch, loss)

    def mutual() -> None:
        mutual_step(local, incoming, batch, loss, dcml=dcml, weight=WEIGHT, sigmoid=config.data.is_sigmoid)

    calls = [lambda: seconds_of(two_local, steps, device), lambda: seconds_of(mutual, steps, device)]
    interleaved(calls, repeats=1)  # warm-up
    separate, together = interleaved(calls, repeats=repeats)
    return Result(statistics.median(separate), statistics.median(together), median_ratio(together, separate))


def seconds_of(step: Callable[[], object], steps: int, device: torch.device) -> float:
    """Mean seconds of one step: on a CPU those that this process got, so that others do not count."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    finish(device)
    began = clock()
    for _ in range(steps):
        step()
    finish(device)
    return (clock() - began) / steps


def finish(device: torch.device) -> None:
    """Waits until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["unet", "lgg"], choices=WORKLOADS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--amp", default="none", choices=("none", "bf16", "fp16"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as sites do
    devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    print(
        "| network | device | variant | two local steps, ms | mutual step, ms | ratio |\n|---|---|---|---:|---:|---:|"
    )
    for name in options.workloads:
        for device in devices:
            for variant in options.variants:
                dcml = DcmlConfig(variant=variant)
                amp = options.amp if device.type == "cuda" else "none"
                found = measure(name, device, dcml=dcml, repeats=options.repeats, steps=options.steps, amp=amp)
                print(
                    f"| {name} | {device.type} | {variant} | {1e3 * found.two_local_s:.1f} "
                    f"| {1e3 * found.mutual_s:.1f} | {found.ratio:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
