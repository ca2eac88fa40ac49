"""The algorithm: losses, networks, gossip graphs, learner, methods, data, metrics. Knows nothing of Ray.

``gcml_ray.load_model(run_folder, site)`` gives a personalised model that predicts new patients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gcml_ray.predict import load_model as load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    """Loads torch when a model is asked for, not when the package is imported."""
    if name != "load_model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gcml_ray.predict import load_model  # noqa: PLC0415 - the driver imports this package and no torch

    return load_model
