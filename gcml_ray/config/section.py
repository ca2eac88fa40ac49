"""What all sections of a configuration share: their rules, and the types of their values."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Shared rules of all sections."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{', '.join(repeated)} stands in it more than once")
    return names


Name = Annotated[str, Field(min_length=1)]
# Tuples that also take a YAML list; their items stay strict.
Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1), AfterValidator(_each_once)]
Sizes = Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(strict=False, min_length=2, max_length=3)]
Lengths = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(strict=False, min_length=2, max_length=3)]
Axes = Annotated[tuple[Annotated[int, Field(ge=0, le=2)], ...], Field(strict=False)]
Weights = Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(strict=False, min_length=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
AtLeastOne = Annotated[float, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
