"""The ``optimiser`` section: the steps, their rate, and the moving average over them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gcml_ray.config.section import Fraction, NonNegative, Positive, Section


class OptimiserConfig(Section):
    """The optimiser of every model; the learning rate follows ``schedule`` over the whole run.

    ``weight_average``: what a moving average of the weights keeps of itself at a step; 0 has none. It is what a site
    validates, keeps and tests (see weight_average.py). ``push_average``: it is also what is pushed.
    """

    name: Literal["adam", "adamw", "sgd"] = "adamw"
    learning_rate: Positive
    weight_decay: NonNegative = 0.0
    momentum: Fraction | None = None
    amsgrad: bool = False
    clip_norm: Positive | None = None
    schedule: Literal["constant", "cosine", "polynomial"] = "cosine"
    weight_average: Annotated[float, Field(ge=0, lt=1)] = 0.0
    push_average: bool = False

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> OptimiserConfig:
        if self.momentum is not None and self.name != "sgd":
            raise ValueError(f"momentum would be ignored by {self.name}: only sgd has it")
        if self.amsgrad and self.name == "sgd":
            raise ValueError("amsgrad would be ignored by sgd")
        if self.push_average and self.weight_average == 0:
            raise ValueError("push_average has no average to push: set weight_average, e.g. 0.99")
        return self
