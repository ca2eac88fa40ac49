"""MONAI in a process that trains and nothing else: without trackers, plots and tables that its handlers bring along.

``import monai`` loads all of MONAI, and whatever it can use and finds: with MLflow, pandas, matplotlib, scikit-learn
and Ignite installed that is three quarters of the import's time and 200 MB (docs/performance.md). No site uses them;
SciPy's signal processing is for ultrasound.
"""

from __future__ import annotations

import sys
from types import ModuleType

UNUSED = (
    *("mlflow", "matplotlib", "pandas", "sklearn", "ignite", "optuna"),
    *("tensorboard", "tensorboardX", "torch.utils.tensorboard", "scipy.signal"),
)


def import_monai() -> None:
    """Imports MONAI as if those libraries were missing; does nothing where it is loaded already.

    They stay missing for MONAI's own handlers and metrics in this process, so it is not for one that runs a user's code
    beside ours. Everybody else can import them afterwards.
    """
    if "monai" in sys.modules:
        return
    loaded: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]  # None makes an import fail
    hidden = [name for name in UNUSED if name not in loaded]
    loaded.update(dict.fromkeys(hidden))
    try:
        import monai  # noqa: F401, PLC0415
    finally:
        for name in hidden:
            del loaded[name]
