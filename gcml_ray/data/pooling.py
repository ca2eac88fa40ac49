"""Which cases a trainer works with: those of its site, or of all sites where they are pooled for comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gcml_ray.config import POOLED, Config
from gcml_ray.data.datalist import Case, assign_splits, cases_of_site, read_datalist, site_names

MARK = ":"  # no site's name has one, so a pooled case's name says which site it is of


def cases_to_train_on(config: Config, site: str) -> tuple[Case, ...]:
    """The cases of a site with their splits; of all sites that take part for the one called ``pooled``.

    Raises:
        DataError: the datalist is wrong, or cases cannot be split.
    """
    cases = read_datalist(config.data.datalist)
    if site != POOLED:
        return assign_splits(cases_of_site(cases, site), config.data.split)
    return pooled_cases(cases, config.federation.sites or site_names(cases), config)


def pooled_cases(cases: Sequence[Case], sites: Sequence[str], config: Config) -> tuple[Case, ...]:
    """The cases of all sites, split site by site as in a federation, as those of one site called ``pooled``."""
    split = assign_splits([case for case in cases if case.site in sites], config.data.split)
    return tuple(map(as_pooled, split))


def as_pooled(case: Case) -> Case:
    """A case of a site as one of the site called ``pooled``."""
    return replace(case, site=POOLED, name=f"{case.site}{MARK}{case.name}")


def origin(site: str, case: str) -> tuple[str, str]:
    """The site that a case comes from, and its name there."""
    if site != POOLED:
        return site, case
    owner, _, name = case.partition(MARK)
    return owner, name
