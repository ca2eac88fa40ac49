"""Large libraries in a process of our own, without what they bring along and we do not use (docs/performance.md).

What is hidden stays missing for the modules that were imported without it (MLflow then has no flavours), so this is
not for a process that runs a user's code beside ours. Everybody else in the process can import it, meanwhile and
afterwards.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from types import ModuleType

BESIDE_MONAI = (
    *("mlflow", "matplotlib", "pandas", "sklearn", "ignite", "optuna"),
    *("tensorboard", "tensorboardX", "torch.utils.tensorboard", "scipy.signal"),
)


def import_monai() -> None:
    """Imports MONAI without trackers, plots and tables, which its handlers load where they are installed.

    With them it takes four times as long and 200 MB more, and no site uses them. SciPy's signal processing is for
    ultrasound.
    """
    with hidden(BESIDE_MONAI):
        import monai  # noqa: F401, PLC0415


class _Finder(MetaPathFinder):
    """Reports some modules as missing, but only to imports in the thread that made it."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)
        self._thread = threading.get_ident()

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """Refuses a hidden module; leaves all others to the next finder."""
        del path, target
        if fullname in self._names and threading.get_ident() == self._thread:
            raise ModuleNotFoundError(f"{fullname} is not loaded here", name=fullname)


@contextmanager
def hidden(names: Sequence[str]) -> Iterator[None]:
    """Within the block this thread's imports do not find these modules, unless they are loaded already."""
    finder = _Finder(names)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
