"""The pre-flight's reading of cases: what no header tells, such as label values, NaN and damaged voxels."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import zip_longest

from gcml_ray.config import DataConfig
from gcml_ray.data.datalist import Case, cases_of_site, listed, site_names
from gcml_ray.data.loading import case_findings
from gcml_ray.data.problems import CaseProblem, grouped
from gcml_ray.doctor.case_headers import MEND_DATA
from gcml_ray.doctor.machine import Check
from gcml_ray.wording import count

BUDGET_S = 60.0  # no further case is begun after this


def check_voxels(cases: Sequence[Case], data: DataConfig, *, clock: Callable[[], float] = time.perf_counter) -> Check:
    """Whether cases can be read whole and hold what the configuration says; of many cases as many as time allows."""
    began = clock()
    problems: list[CaseProblem] = []
    like_ct: Counter[str] = Counter()
    num_read = 0
    for case in _in_turns(cases):
        if clock() - began > BUDGET_S:
            break
        found, looks_like_ct = case_findings(case, data)
        problems += [(case, problem) for problem in found]
        like_ct.update(looks_like_ct)
        num_read += 1
    read = f"{num_read} of {len(cases)} cases read"
    if num_read < len(cases):
        read += f" in {BUDGET_S:g} s (`gcml inspect` reads all)"
    if problems:
        num_bad = len({case for case, _ in problems})
        detail = f"{read}, {num_bad} of them are bad:{listed(grouped(problems, num_read))}"
        return Check("all cases", "FAIL", detail, MEND_DATA)
    if like_ct and data.normalise == "nonzero":
        channels = ", ".join(f"{name} in {count(n, 'case')}" for name, n in like_ct.items())
        detail = f"{read}: whole numbers, some below 0 ({channels}), and data.normalise: nonzero takes 0 for no image"
        return Check("all cases", "WARN", detail, "for CT, where 0 is water, set data.normalise: all")
    return Check("all cases", "PASS", f"{read}: intensities finite, label values known")


def _in_turns(cases: Sequence[Case]) -> list[Case]:
    """A case of each site, then the next one of each."""
    sites = [cases_of_site(cases, site) for site in site_names(cases)]
    return [case for turn in zip_longest(*sites) for case in turn if case is not None]
