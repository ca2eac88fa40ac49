"""What the imports of a site's process cost, one by one: processor seconds, and the process's peak memory after each.

python -m benchmarks.imports          # as a site's process does it
python -m benchmarks.imports plain    # MONAI and PyTorch's optimisers as they come
"""
# ruff: noqa: PLC0415 - each import is measured where it stands

from __future__ import annotations

import resource
import sys
import time


class Laps:
    """Prints what has been used since the last lap."""

    def __init__(self) -> None:
        self.done = 0.0

    def note(self, part: str) -> None:
        """One part is done."""
        now, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(f"{part}: {now - self.done:.2f} s, {peak / 1e6:.0f} MB")
        self.done = now


def main() -> None:
    """Imports part by part."""
    laps = Laps()
    import ray  # noqa: F401

    import actors.site  # noqa: F401

    laps.note("Python, Ray and the site's class")
    import torch

    laps.note("PyTorch")
    if sys.argv[1:] == ["plain"]:
        import monai  # noqa: F401
    else:
        from gcml_ray.lean_imports import import_monai

        import_monai()
    laps.note("MONAI")
    if sys.argv[1:] == ["plain"]:
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    else:
        from gcml_ray.config import OptimiserConfig
        from gcml_ray.model.flat_optimiser import FlatOptimiser

        FlatOptimiser(torch.nn.Parameter(torch.zeros(1)), OptimiserConfig(name="sgd", learning_rate=0.1))
    laps.note("the first optimiser")


if __name__ == "__main__":
    main()
