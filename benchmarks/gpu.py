"""Steps on a GPU: local and mutual step against a bare PyTorch loop of the same network, loss and optimiser.

No sites and no Ray. The bare loop keeps each tensor of the network by itself, as any PyTorch script does; the local
step keeps one flat vector. Steps a second, peak memory, and shares of the device's peak: of arithmetic as counted by
torch.utils.flop_counter (convolutions and matrix products), and of memory traffic in the optimiser's step. Peaks are
measured here (a large matrix product, a large copy), not taken from a data sheet.

    python -m benchmarks.gpu --workloads sanet_small sanet --amp none bf16
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.dcml import WEIGHT, finish, seconds_of
from benchmarks.workloads import WORKLOADS, interleaved, make_batch, make_config, make_learner, make_loss, median_ratio
from gcml_ray.config import Config, DcmlConfig
from gcml_ray.data.site_data import Batch
from gcml_ray.losses.segmentation import SegmentationLoss
from gcml_ray.model.learner import local_step, mutual_step
from gcml_ray.model.precision import Precision
from gcml_ray.networks.registry import build_network, forward_heads
from gcml_ray.training.cpu import keep_freed_memory

DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Peak:
    """What the device does at best: operations and bytes a second."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Result:
    """One workload: steps a second, median ratios of seconds, peak bytes by kind of step, operations of a bare step."""

    bare_per_s: float
    local_per_s: float
    mutual_per_s: float
    local_to_bare: float
    mutual_to_two_local: float
    peak_bytes: dict[str, int]
    flops: float


def bare_step(config: Config, batch: Batch, loss: SegmentationLoss, device: torch.device) -> Callable[[], None]:
    """A training step as a script would have it."""
    module = build_network(config.network, config.data).to(device).train()
    rate, decay = config.optimiser.learning_rate, config.optimiser.weight_decay
    kind = torch.optim.AdamW if config.optimiser.name == "adamw" else torch.optim.Adam
    optimiser = kind(module.parameters(), lr=rate, weight_decay=decay, amsgrad=config.optimiser.amsgrad, fused=True)
    precision = Precision(device.type, config.resources.amp)
    scaler = torch.amp.GradScaler(device.type, enabled=config.resources.amp == "fp16" and device.type != "cpu")

    def step() -> None:
        optimiser.zero_grad()
        with precision.autocast():
            heads = forward_heads(module, batch.image)
        scaler.scale(loss(heads, batch.label)).backward()  # type: ignore[no-untyped-call]
        if config.optimiser.clip_norm is not None:
            scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_(module.parameters(), config.optimiser.clip_norm)
        scaler.step(optimiser)
        scaler.update()

    return step


def measure(name: str, device: torch.device, *, amp: str, repeats: int, steps: int) -> Result:
    """Times one workload, its three kinds of step in turn."""
    config = make_config(WORKLOADS[name], amp=amp)
    loss, batch = make_loss(config), make_batch(config, device)
    bare = bare_step(config, batch, loss, device)
    peak_bytes = {"bare": peak_of(bare, device)}
    with FlopCounterMode(display=False) as counter:
        bare()
    first, second = (make_learner(config, device, site=site) for site in "AB")

    def local() -> None:
        local_step(first, batch, loss)

    def mutual() -> None:
        sigmoid = config.data.is_sigmoid
        mutual_step(first, second, batch, loss, dcml=DcmlConfig(), weight=WEIGHT, sigmoid=sigmoid)

    peak_bytes |= {"local": peak_of(local, device), "mutual": peak_of(mutual, device)}
    calls = [lambda step=step: seconds_of(step, steps, device) for step in (bare, local, mutual)]
    interleaved(calls, repeats=1)  # warm-up
    bare_s, local_s, mutual_s = interleaved(calls, repeats=repeats)
    return Result(
        bare_per_s=1 / statistics.median(bare_s),
        local_per_s=1 / statistics.median(local_s),
        mutual_per_s=1 / statistics.median(mutual_s),
        local_to_bare=median_ratio(local_s, bare_s),
        mutual_to_two_local=median_ratio(mutual_s, local_s) / 2,
        peak_bytes=peak_bytes,
        flops=float(counter.get_total_flops()),
    )


def peak_of(step: Callable[[], None], device: torch.device) -> int:
    """Bytes that one step has allocated at most on a GPU, what is always there included; 0 on a CPU."""
    if device.type != "cuda":
        step()
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    step()
    finish(device)
    return torch.cuda.max_memory_allocated(device)


def measure_peak(device: torch.device, *, amp: str, size: int, repeats: int = 5) -> Peak:
    """The fastest square matrix product and copy of this size."""
    left = torch.randn(size, size, device=device).to(DTYPES[amp])
    target = torch.empty_like(left)
    product_s = min(seconds_of(lambda: torch.mm(left, left), 3, device) for _ in range(repeats))
    copy_s = min(seconds_of(lambda: target.copy_(left), 3, device) for _ in range(repeats))
    copied = 2 * left.numel() * left.element_size()  # read and written
    return Peak(2 * size**3 / product_s, copied / copy_s)


def optimiser_share(name: str, device: torch.device, peak: Peak, *, steps: int) -> float:
    """Share of the peak bandwidth that the optimiser step reaches: weights, gradient and moments, read and written."""
    learner = make_learner(make_config(WORKLOADS[name]), device)
    learner.model.gradient.normal_()
    learner.clip_norm = None
    learner.take_step()
    seconds = seconds_of(learner.take_step, steps, device)
    moments = sum(moment.numel() > 1 for moment in learner.optimiser.moments.values())
    traffic = 4.0 * learner.model.num_parameters * (2 + 1 + 2 * moments)
    return float(traffic / seconds / peak.bandwidth)


def main() -> None:
    """Prints a Markdown table; refuses without CUDA unless told to use the CPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["lgg", "sanet_small", "sanet"], choices=WORKLOADS)
    parser.add_argument("--amp", nargs="+", default=["none", "bf16"], choices=DTYPES)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--matrix", type=int, default=8192, help="rows of the matrix that finds the peak")
    parser.add_argument("--cpu", action="store_true", help="only to try this program: figures mean little")
    options = parser.parse_args()
    if not options.cpu and not torch.cuda.is_available():
        raise SystemExit(
            "no CUDA device: torch.cuda.is_available() is false. This benchmark measures a GPU; for steps on a CPU see "
            "benchmarks.dcml, and to try the program itself use --cpu --workloads tiny --amp none --matrix 256 "
            "--repeats 1 --steps 1"
        )
    device = torch.device("cpu" if options.cpu else "cuda")
    if options.cpu:
        keep_freed_memory()
    else:
        print(f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}\n")
    print(
        "| network | precision | bare, steps/s | local, steps/s | mutual, steps/s | local / bare, time "
        "| mutual / two local, time | memory bare / local / mutual, GB | of peak FLOP/s | optimiser, of peak B/s |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name in options.workloads:
        for amp in options.amp:
            peak = measure_peak(device, amp=amp, size=options.matrix)
            found = measure(name, device, amp=amp, repeats=options.repeats, steps=options.steps)
            memory = " / ".join(f"{size / 1e9:.2f}" for size in found.peak_bytes.values())
            print(
                f"| {name} | {amp} | {found.bare_per_s:.2f} | {found.local_per_s:.2f} | {found.mutual_per_s:.2f} "
                f"| {found.local_to_bare:.3f} | {found.mutual_to_two_local:.3f} | {memory} "
                f"| {found.flops * found.local_per_s / peak.flops:.3f} "
                f"| {optimiser_share(name, device, peak, steps=options.steps):.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
