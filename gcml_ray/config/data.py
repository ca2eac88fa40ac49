"""The ``data`` section of a configuration: what the images and labels are, and how patches are made from them."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator, model_validator

from gcml_ray.config.section import Axes, Count, CountOrZero, Fraction, Lengths, Names, NonNegative, Section, Sizes

BACKGROUND = ("background", "bg")  # what the first class may be called, and no other
MAX_CLASSES = 256  # background included: class indices are bytes
AXIS_CODES = (("L", "R"), ("P", "A"), ("I", "S"))  # where an axis may point to, as nibabel and MONAI name it


class SplitConfig(Section):
    """Shares of a site's cases; every site keeps at least one validation and one test case."""

    validation: Fraction = 0.1
    test: Fraction = 0.2

    @model_validator(mode="after")
    def _leaves_training_cases(self) -> SplitConfig:
        if self.validation + self.test >= 1:
            raise ValueError("validation + test must stay below 1, else nothing is left to train on")
        return self


class AugmentConfig(Section):
    """Random changes of a training patch; a probability of 0 switches one off."""

    flip_axes: Axes = (0,)
    flip_probability: Fraction = 0.5
    intensity_probability: Fraction = 0.5
    intensity_scale: Fraction = 0.1
    intensity_shift: Fraction = 0.1
    noise_probability: Fraction = 0.0
    noise_std: NonNegative = 0.05

    @model_validator(mode="after")
    def _axes_differ(self) -> AugmentConfig:
        if len(set(self.flip_axes)) != len(self.flip_axes):
            raise ValueError(f"flip_axes {self.flip_axes} names an axis twice")
        return self


class DataConfig(Section):
    """What the images and labels are, and how patches are made from them.

    ``labels`` maps each class name to its value in the label files; the first one is the background.
    With ``regions`` (nested foreground channels, e.g. BraTS WT/TC/ET as lists of label names) the
    target is sigmoid, without it softmax. ``spacing_is_real: false`` says that the voxel sizes in the
    headers mean nothing: nothing is resampled by them, and distances are reported in voxels.
    """

    datalist: str
    channels: Names
    labels: dict[str, int]
    regions: dict[str, Names] | None = None
    spatial_dims: Literal[2, 3] = 3
    spacing_is_real: bool
    target_spacing_mm: Lengths | None = None
    orientation: str | None = "RAS"
    resize: Sizes | None = None
    normalise: Literal["nonzero", "all"] = "nonzero"
    patch_size: Sizes
    batch_size: Count = 2
    foreground_share: Fraction = 0.67
    augment: AugmentConfig = AugmentConfig()
    split: SplitConfig = SplitConfig()
    cache_folder: str | None = None
    num_workers: CountOrZero = 0

    @property
    def is_sigmoid(self) -> bool:
        """Whether the target is nested sigmoid channels rather than softmax classes."""
        return self.regions is not None

    @property
    def num_outputs(self) -> int:
        """Output channels of a network: classes with background (softmax) or regions (sigmoid)."""
        return len(self.regions) if self.regions is not None else len(self.labels)

    @property
    def foreground_names(self) -> tuple[str, ...]:
        """Names that metrics are reported for: the regions, or every class but the background."""
        return tuple(self.regions) if self.regions is not None else tuple(self.labels)[1:]

    @property
    def distance_unit(self) -> str:
        """Unit of HD95 and of the surface tolerance."""
        return "mm" if self.spacing_is_real else "voxel"

    @field_validator("orientation")
    @classmethod
    def _axes_have_names(cls, codes: str | None) -> str | None:
        pairs = sorted(next((pair for pair in AXIS_CODES if code in pair), ()) for code in codes or "")
        if codes is not None and pairs != sorted(AXIS_CODES):
            raise ValueError(
                f"received {codes!r}; must be one letter each of L or R, P or A, I or S, such as RAS, or null to leave "
                "the axes as they are"
            )
        return codes

    @model_validator(mode="after")
    def _classes_are_apart(self) -> DataConfig:
        if len(self.labels) < 2:
            raise ValueError("labels needs the background and at least one more class")
        if len(self.labels) > MAX_CLASSES:
            raise ValueError(f"labels lists {len(self.labels)} classes; {MAX_CLASSES} at most can be told apart")
        first, *others = self.labels
        for name in others:
            is_zero = self.labels[name] == 0 and first.lower() not in BACKGROUND
            if is_zero or name.lower() in BACKGROUND:
                raise ValueError(
                    f"labels begins with {first}: {self.labels[first]}, and what stands first is the background; put "
                    f"{name}: {self.labels[name]} first"
                )
        if len(set(self.labels.values())) != len(self.labels):
            raise ValueError(f"labels gives one value to two classes: {self.labels}")
        if self.regions is not None and not self.regions:
            raise ValueError("regions is empty: name at least one, or leave it out for classes that exclude each other")
        for region, parts in (self.regions or {}).items():
            unknown = [part for part in parts if part not in self.labels]
            if unknown:
                raise ValueError(f"regions.{region} names {unknown}, not among labels {list(self.labels)}")
        return self

    @model_validator(mode="after")
    def _axes_fit(self) -> DataConfig:
        for key in ("patch_size", "resize", "target_spacing_mm"):
            value = getattr(self, key)
            if value is not None and len(value) != self.spatial_dims:
                raise ValueError(f"{key} has {len(value)} numbers, spatial_dims is {self.spatial_dims}")
        if self.target_spacing_mm is not None and not self.spacing_is_real:
            raise ValueError("target_spacing_mm is set but spacing_is_real is false: there is nothing to resample from")
        if self.target_spacing_mm is not None and self.resize is not None:
            raise ValueError("set target_spacing_mm or resize, not both")
        if any(axis >= self.spatial_dims for axis in self.augment.flip_axes):
            raise ValueError(f"augment.flip_axes {self.augment.flip_axes} goes beyond {self.spatial_dims} axes")
        return self
