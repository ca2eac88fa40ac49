"""BraTS / FeTS-2022 (brain tumours in four MRI sequences) with its institutions as sites.

Layout: ``<folder>/<Subject>/<Subject>_{t1,t1ce,t2,flair,seg}.nii.gz``, all on one grid of 1 mm. Labels: 1 necrotic
core, 2 oedema, 4 enhancing tumour (releases from 2023 on write 3 for it and name the sequences otherwise: not this
layout). The challenge's ``partitioning_1.csv`` (columns ``Partition_ID``, ``Subject_ID``) tells each subject's
institution; ``partitioning_2.csv`` divides the large ones further, its numbers are others.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gcml_ray.data.adapters.findings import Findings, Progress, check_cases, find_nifti, read_rows
from gcml_ray.data.adapters.published_split import SplitSizes, published_split
from gcml_ray.data.datalist import Case
from gcml_ray.errors import DataError

CHANNELS = ("t1", "t1ce", "t2", "flair")
LABEL_VALUES = (0, 1, 2, 4)
# Institution -> sizes in Chen and Yuan (arXiv 2503.03883): 152 training, 27 validation, 48 test cases.
PUBLISHED = {
    4: SplitSizes(32, 5, 10),
    5: SplitSizes(15, 3, 4),
    6: SplitSizes(23, 4, 7),
    7: SplitSizes(7, 2, 3),
    11: SplitSizes(9, 2, 3),
    16: SplitSizes(21, 3, 6),
    20: SplitSizes(22, 4, 7),
    21: SplitSizes(23, 4, 8),
}


def prepare_fets(
    folder: str | Path,
    partition: str | Path,
    *,
    institutions: Sequence[int] = tuple(PUBLISHED),
    skip_faulty: bool = False,
    progress: Progress | None = None,
) -> tuple[Case, ...]:
    """The cases of the chosen institutions, with the published split where its sizes fit.

    Args:
        folder: holds one folder a subject.
        partition: the CSV with ``Partition_ID`` and ``Subject_ID``.
        institutions: their numbers; by default the eight of the paper.
        skip_faulty: leave out cases with problems, with a warning each, instead of raising.
        progress: called after each case with (cases done, cases in all).

    Returns:
        Cases of the sites ``inst04`` ..., channels t1, t1ce, t2, flair. Files stay where they are.

    Raises:
        DataError: rows without folder, folders without row, missing sequences, grids that differ, unknown labels,
            subjects listed twice, institutions without cases; all at once.
    """
    folder = Path(os.path.abspath(folder))
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the one that holds a folder for each subject")
    findings = Findings(folder)
    chosen = {number: site_name(number) for number in institutions}
    rows = _read_partition(partition, findings)
    folders = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))}
    for subject in sorted(folders - set(rows)):
        findings.general.append(f"folder {subject} has no row in {Path(partition).name}; add its institution there")
    wanted = {subject: chosen[number] for subject, number in rows.items() if number in chosen}
    for subject in sorted(set(wanted) - folders):
        findings.general.append(f"subject {subject} ({wanted[subject]}) of {Path(partition).name} has no folder")
    cases = [_case(folder, subject, wanted[subject], findings) for subject in sorted(set(wanted) & folders)]
    for site in sorted(set(chosen.values()) - {case.site for case in cases}):
        findings.general.append(f"site {site} has no case; leave it out with --institutions")
    check_cases(cases, findings, channels=CHANNELS, label_values=LABEL_VALUES, progress=progress)
    sizes = {site_name(number): size for number, size in PUBLISHED.items()}
    return published_split(findings.sound(cases, skip_faulty=skip_faulty), sizes)


def site_name(institution: int) -> str:
    """4 -> ``inst04``: a name that sorts like the number."""
    return f"inst{institution:02d}"


def _read_partition(path: str | Path, findings: Findings) -> dict[str, int]:
    """Subject -> institution; a subject that stands there twice, or a row that means nothing, is a problem."""
    name = Path(path).name
    rows: dict[str, int] = {}
    for line, row in read_rows(path, ("Partition_ID", "Subject_ID")):
        subject, number = row["Subject_ID"], row["Partition_ID"]
        if not subject or not number.isdigit():
            findings.general.append(f"{name}, line {line}: Partition_ID {number!r} and Subject_ID {subject!r}; "
                                    "a whole number and a name were expected")  # fmt: skip
        elif subject in rows:
            findings.about(subject, [f"is listed twice in {name}, again in line {line}; remove one"])
        else:
            rows[subject] = int(number)
    return rows


def _case(folder: Path, subject: str, site: str, findings: Findings) -> Case:
    problems: list[str] = []
    *images, label = (str(find_nifti(folder / subject, f"{subject}_{kind}", problems)) for kind in (*CHANNELS, "seg"))
    findings.about(subject, problems)
    return Case(site=site, name=subject, images=tuple(images), label=label, split=None)
