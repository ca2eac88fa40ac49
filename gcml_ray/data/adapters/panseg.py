"""PanSegData (pancreas in T1- or T2-weighted MRI, five centres; Zhang et al. 2024, arXiv 2405.12367).

Layout: nnU-Net's, one folder a sequence: ``t1/imagesTr/AHN_0001_0000.nii.gz`` with ``t1/labelsTr/AHN_0001.nii.gz``;
the letters in front are the centre. Two things could not be confirmed: that every centre's prefix is the one of the
paper (NYU, MCF, NWU, AHN, MCA), and that all cases lie in ``imagesTr``. The number of cases a site tells.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from gcml_ray.data.adapters.findings import Findings, Progress, check_cases
from gcml_ray.data.adapters.nnunet import nnunet_cases
from gcml_ray.data.adapters.published_split import SplitSizes, published_split
from gcml_ray.data.datalist import Case

CHANNELS = ("mri",)
LABEL_VALUES = (0, 1)
PREFIX = re.compile(r"([A-Za-z]+)[_-]?\d")
# Sizes in Chen and Yuan (arXiv 2503.03883), T1: 269 training, 39 validation, 76 test cases.
PUBLISHED = {
    "NYU": SplitSizes(113, 16, 32),
    "MCF": SplitSizes(106, 15, 30),
    "NWU": SplitSizes(21, 3, 6),
    "AHN": SplitSizes(12, 2, 3),
    "MCA": SplitSizes(17, 3, 5),
}


def prepare_panseg(
    folder: str | Path,
    *,
    sites: Sequence[str] = tuple(PUBLISHED),
    skip_faulty: bool = False,
    progress: Progress | None = None,
) -> tuple[Case, ...]:
    """The cases of one sequence, with the published split where its sizes fit.

    Args:
        folder: ``t1`` or ``t2``, which holds ``imagesTr`` and ``labelsTr``.
        sites: prefixes of the centres that take part.
        skip_faulty: leave out cases with problems, with a warning each, instead of raising.
        progress: called after each case with (cases done, cases in all).

    Returns:
        Cases with one channel; files stay where they are.

    Raises:
        DataError: cases without image, label or known centre, or there twice, grids that differ, unknown labels,
            centres without cases; all at once.
    """
    folder = Path(os.path.abspath(folder))
    findings = Findings(folder)
    cases = nnunet_cases(folder, findings, num_channels=1, ending=".nii.gz", site_of=centre_of)
    for case in cases:
        if case.site and case.site not in sites:
            findings.about(case.name, [f"its centre {case.site} is none of {', '.join(sites)}; see --sites"])
    for site in sites:
        if site not in {case.site for case in cases}:
            findings.general.append(f"site {site} has no case; leave it out with --sites")
    check_cases(cases, findings, channels=CHANNELS, label_values=LABEL_VALUES, progress=progress)
    return published_split(findings.sound(cases, skip_faulty=skip_faulty), PUBLISHED)


def centre_of(name: str) -> str | None:
    """``AHN_0001`` -> ``AHN``; None where there are no letters in front of a number."""
    match = PREFIX.match(name)
    return None if match is None else match.group(1).upper()
