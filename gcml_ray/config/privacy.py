"""The ``privacy`` section: what a site's weights may tell of its cases; off by default (docs/privacy.md)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gcml_ray.config.data import DataConfig
from gcml_ray.config.methods import LocalMethod, Method, PooledMethod
from gcml_ray.config.resources import ResourcesConfig
from gcml_ray.config.section import NonNegative, Positive, Section


class PrivacyConfig(Section):
    """Differentially private training (``dp_sgd``) or clipped and noised pushes (``update_noise``).

    ``noise_multiplier`` is the noise's standard deviation over the clipping norm, which is ``max_grad_norm`` (one
    case's gradient) or ``max_update_norm`` (one push). ``seeded`` derives noise from ``federation.seed``: for tests.
    """

    mode: Literal["none", "dp_sgd", "update_noise"] = "none"
    noise_multiplier: NonNegative | None = None
    max_grad_norm: Positive | None = None
    max_update_norm: Positive | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    epsilon_limit: Positive | None = None
    seeded: bool = False

    @model_validator(mode="after")
    def _keys_are_those_of_the_mode(self) -> PrivacyConfig:
        norm = {"dp_sgd": {"max_grad_norm"}, "update_noise": {"max_update_norm"}}.get(self.mode, set())
        needed = {"noise_multiplier", "delta"} | norm if norm else set()
        allowed = needed | {"mode"} | ({"seeded"} if norm else set())
        allowed |= {"epsilon_limit"} if self.mode == "dp_sgd" else set()
        given = {key for key in type(self).model_fields if getattr(self, key) not in (None, False)}
        given |= {"noise_multiplier"} if self.noise_multiplier == 0 else set()
        if missing := sorted(needed - given):
            raise ValueError(f"mode {self.mode} needs {', '.join(missing)}")
        if ignored := sorted(given - allowed):
            raise ValueError(f"{', '.join(ignored)} would be ignored by mode {self.mode}: leave out or change mode")
        if self.epsilon_limit is not None and self.noise_multiplier == 0:
            raise ValueError("epsilon_limit cannot be kept with noise_multiplier 0: epsilon is infinite without noise")
        return self


def privacy_problem(privacy: PrivacyConfig, method: Method, data: DataConfig, resources: ResourcesConfig) -> str:
    """Which setting of another section contradicts the privacy asked for, and why; empty if none does."""
    if privacy.mode == "update_noise" and isinstance(method, LocalMethod | PooledMethod):
        return f"privacy.mode update_noise would be ignored: method {method.name} pushes nothing"
    if privacy.mode == "dp_sgd" and resources.amp == "fp16":
        return "privacy.mode dp_sgd clips gradients itself and cannot use the scaling of fp16: set resources.amp bf16"
    if privacy.mode == "dp_sgd" and resources.compile:
        return "privacy.mode dp_sgd takes the gradient of each case: set resources.compile false"
    if privacy.mode == "dp_sgd" and data.num_workers:
        return f"data.num_workers {data.num_workers} would be ignored: privacy.mode dp_sgd draws its cases by itself"
    return ""
