"""Splits of which only the sizes were published: so many training, validation and test cases a site."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from gcml_ray.data.datalist import Case, cases_of_site, site_names
from gcml_ray.records import Split
from gcml_ray.seeding import derive_seed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitSizes:
    """Number of cases of one site."""

    train: int
    validation: int
    test: int

    @property
    def total(self) -> int:
        """All cases of the site."""
        return self.train + self.validation + self.test


def published_split(cases: Sequence[Case], sizes: Mapping[str, SplitSizes]) -> tuple[Case, ...]:
    """Split the sites that have exactly as many cases as published; the others keep ``split`` None.

    For these ``data.split`` of the configuration decides, and a warning says so. Which case went where was not
    published: the order of a hash of site and name decides (our reading), the same on every machine.
    """
    splits: dict[tuple[str, str], Split] = {}
    for site in site_names(cases):
        names = [case.name for case in cases_of_site(cases, site)]
        wanted = sizes.get(site)
        if wanted is None or wanted.total != len(names):
            said = "no published split" if wanted is None else f"the published split is of {wanted.total}"
            log.warning("site %s has %d cases, %s: data.split of the configuration decides", site, len(names), said)
            continue
        names.sort(key=partial(derive_seed, 0, "published split", site))
        counts: dict[Split, int] = {"validation": wanted.validation, "test": wanted.test, "train": wanted.train}
        kinds = [split for split, count in counts.items() for _ in range(count)]
        splits |= {(site, name): split for name, split in zip(names, kinds, strict=True)}
    return tuple(replace(case, split=splits.get((case.site, case.name))) for case in cases)
