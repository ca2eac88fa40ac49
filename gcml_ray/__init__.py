"""The algorithm and all that needs no Ray: configuration, data, models, methods, privacy, metrics, reports, commands.

A map of the packages, and in which order they may import each other, is in ``docs/architecture.md``.

``gcml_ray.Federation(config).run()`` trains a federation from Python; ``gcml_ray.load_model(run_folder, site)`` gives a
personalised model that predicts new patients.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gcml_ray.federation import Federation as Federation
    from gcml_ray.federation import FederationResult as FederationResult
    from gcml_ray.prediction.load import load_model as load_model

__all__ = ["Federation", "FederationResult", "load_model"]

_HOMES = {"Federation": "federation", "FederationResult": "federation", "load_model": "prediction.load"}


def __getattr__(name: str) -> Any:
    """Loads a module when a name of it is asked for: the driver imports this package and not torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"gcml_ray.{_HOMES[name]}"), name)
