"""What is known of a datalist's cases after a look at their files."""

from __future__ import annotations

from dataclasses import dataclass

from gcml_ray.records import Split

PERCENTILES = (1, 25, 50, 75, 99)


@dataclass(frozen=True)
class ChannelFacts:
    """One channel of one case: ``PERCENTILES`` of its bright voxels, and the share of voxels that are 0.

    Bright are those above the channel's mean, which leaves out air and the frame around a picture.
    """

    name: str
    percentiles: tuple[float, ...]
    zero_share: float

    @property
    def median(self) -> float:
        """The middle intensity of the bright voxels."""
        return self.percentiles[PERCENTILES.index(50)]


@dataclass(frozen=True)
class LabelFacts:
    """One label value of one case: its size in the inspection's unit, and in how many connected pieces it lies.

    Voxels that touch at a side, edge or corner belong to one piece.
    """

    value: int
    size: float
    num_pieces: int


@dataclass(frozen=True)
class CaseFacts:
    """One case. ``shape`` is None where the first image cannot be read, ``spacing_mm`` also for pictures.

    ``problems`` stop a run or spoil it; ``notes`` are worth a look. The digests of its images and of its label are
    empty where these were not read; the label's also where nothing is marked.
    """

    site: str
    name: str
    split: Split | None
    shape: tuple[int, ...] | None = None
    spacing_mm: tuple[float, ...] | None = None
    orientation: str | None = None
    channels: tuple[ChannelFacts, ...] = ()
    labels: tuple[LabelFacts, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    images_digest: str = ""
    label_digest: str = ""


@dataclass(frozen=True)
class Inspection:
    """All cases, what is wrong with them and between them. ``size_unit`` is that of the labels' sizes."""

    cases: tuple[CaseFacts, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    size_unit: str
    is_quick: bool
    spacing_is_real: bool

    @property
    def sites(self) -> tuple[str, ...]:
        """All sites, sorted."""
        return tuple(sorted({case.site for case in self.cases}))

    @property
    def channel_names(self) -> tuple[str, ...]:
        """Names of all channels, in order."""
        return tuple(dict.fromkeys(channel.name for case in self.cases for channel in case.channels))

    @property
    def label_values(self) -> tuple[int, ...]:
        """All label values but 0 that some case holds."""
        return tuple(sorted({label.value for case in self.cases for label in case.labels}))

    def of_site(self, site: str) -> tuple[CaseFacts, ...]:
        """One site's cases."""
        return tuple(case for case in self.cases if case.site == site)
