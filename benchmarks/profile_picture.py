"""A picture of where a run spent its processor time, from samples of py-spy (``pip install py-spy``).

Each sample is a stack of functions; it counts for the innermost part below that it passes through, so the parts add up
to all samples. What passes through none of them is the rest; start-up is left out of the picture.

    py-spy record -f raw -r 50 -o profile.txt -- python -m gcml_ray run configs/phantom.yaml \
        --set resources.pool=local --set federation.rounds=8
    python -m benchmarks.profile_picture profile.txt docs/images/profile_local_run.svg
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

# Functions as py-spy names them, and the part of a run that they stand for; of several the innermost counts.
PARTS = {
    "backward (torch/_tensor.py": "backward pass",
    "forward_heads": "forward pass",
    "segmentation_loss": "segmentation loss",
    "mutual_divergences": "mutual divergence",
    "take_step": "clipping and optimiser",
    "zero_": "clipping and optimiser",
    "batches (gcml_ray/data/site_data.py": "patches and augmentation",
    "validation_dice": "validation",
    "evaluate (gcml_ray/training/evaluation.py": "test of the end",
    "draw (gcml_ray/training/evaluation.py": "overlays of the end",
    "open_incoming": "pushes, mixing",
    "push (actors/site.py": "pushes, mixing",
    "receive (actors/site.py": "pushes, mixing",
    "mix (gcml_ray/model/weights.py": "pushes, mixing",
    "save (gcml_ray/training/site_files.py": "checkpoints",
    "advance (gcml_ray/training/site_files.py": "checkpoints",
    "record (actors/driver.py": "driver",
    "plan (actors/driver.py": "driver",
    "write_state (actors/driver.py": "driver",
    "start (gcml_ray/training/trainer.py": "start: data and models",
    "_find_and_load": "start: imports",
}
REST = "the rest"
WAITING = "_worker (concurrent/futures/thread.py"  # innermost: a thread with nothing to do, which py-spy takes for busy


def parts_of(lines: Iterable[str]) -> Counter[str]:
    """Samples by part, from the raw format of py-spy: functions from the outermost on, semicolons between, a count."""
    found: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rstrip().rpartition(" ")
        if not stack or stack.rpartition(";")[2].startswith(WAITING):
            continue
        inner = (part for frame in reversed(stack.split(";")) for name, part in PARTS.items() if name in frame)
        found[next(inner, REST)] += int(count)
    return found


def draw(parts: Counter[str], path: Path, *, title: str) -> None:
    """One bar a part, the largest on top, in per cent of the samples after start-up."""
    import matplotlib as mpl  # noqa: PLC0415 - only to draw

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - as above

    shown = [(part, count) for part, count in parts.most_common() if not part.startswith("start:")]
    total = sum(count for _, count in shown)
    figure, axes = plt.subplots(figsize=(7, 0.32 * len(shown) + 1))
    shares = [100 * count / total for _, count in shown]
    bars = axes.barh([part for part, _ in shown], shares, color="#3b6ea5")
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"per cent of processor time after start-up ({total} samples)")
    axes.set_title(title, loc="left", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Draws, and prints what is drawn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--title", default="Where a run spends its processor time")
    options = parser.parse_args()
    parts = parts_of(options.samples.read_text().splitlines())
    draw(parts, options.picture, title=options.title)
    for part, count in parts.most_common():
        print(f"{part:28} {count:7d}")


if __name__ == "__main__":
    main()
