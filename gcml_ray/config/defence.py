"""The ``defence`` section: how an accepted push is judged before it may touch the receiver's model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gcml_ray.config.section import Count, Fraction, Section


class DefenceConfig(Section):
    """Checks that a receiver makes of an incoming model, alone and on its own data (:mod:`gcml_ray.training.judge`).

    ``weights``: norm and direction beside the receiver's own model. ``validation``: Dice on a patch of up to
    ``cases`` of the receiver's validation cases beside its own model's there.
    """

    weights: bool = True
    validation: bool = True
    cases: Count = 2
    max_norm_ratio: Annotated[float, Field(gt=1)] = 3.0
    min_cosine: Annotated[float, Field(ge=-1, lt=1)] = 0.1
    min_own_dice: Fraction = 0.2
    min_dice_share: Fraction = 0.15
