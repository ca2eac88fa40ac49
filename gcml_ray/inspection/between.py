"""What a look at all cases together shows: cases that are listed twice, differ from the others, or share a label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from gcml_ray.config.data import AXIS_CODES
from gcml_ray.data.datalist import few_cases_problem
from gcml_ray.files.site_names import site_name_problem
from gcml_ray.inspection.facts import CaseFacts
from gcml_ray.wording import some

RARE = 0.1  # share of the cases: a label value that fewer have may be a mistake
MIN_CASES = 3  # of which a value in a single one can be called rare
MAX_NAMED = 3  # cases of a note


def problems_between(facts: Sequence[CaseFacts]) -> list[str]:
    """Sites that no run can take, same images under two names, and cases with other axes or channels than most."""
    sites: dict[str, list[str]] = {}
    for case in facts:
        sites.setdefault(case.site, []).append(case.name)
    problems = [problem for site in sites if (problem := site_name_problem(site)) is not None]
    problems += [problem for site, names in sites.items() if (problem := few_cases_problem(site, names)) is not None]
    first: dict[str, CaseFacts] = {}
    for case in facts:
        twin = first.setdefault(case.images_digest, case) if case.images_digest else case
        if twin is not case:
            problems.append(
                f"site {case.site}, case {case.name} holds the same images as site {twin.site}, case {twin.name}; "
                "leave one out, else a case that is tested may have been trained on"
            )
    shapes = {f"site {case.site}, case {case.name}": len(case.shape) for case in facts if case.shape is not None}
    num_axes = [number for number, _ in Counter(shapes.values()).most_common(1)]
    problems += [
        f"{case} has {number} axes, most have {num_axes[0]}: a run takes either 2D images or volumes"
        for case, number in shapes.items()
        if number not in num_axes
    ]
    read = [case for case in facts if not case.problems]
    usual = [number for number, _ in Counter(len(case.channels) for case in read).most_common(1)]
    problems += [
        f"site {case.site}, case {case.name} has {len(case.channels)} channel(s), most have {usual[0]}"
        for case in read
        if len(case.channels) not in usual
    ]
    return problems


def gathered_notes(facts: Sequence[CaseFacts]) -> list[str]:
    """One line for each site and note, with its cases."""
    by_note: dict[tuple[str, str], list[str]] = {}
    for case in facts:
        for note in case.notes:
            by_note.setdefault((case.site, note), []).append(case.name)
    return [
        f"site {site}, {len(names)} case(s) ({some(names, MAX_NAMED)}): {note}"
        for (site, note), names in by_note.items()
    ]


def notes_between(facts: Sequence[CaseFacts], *, spacing_is_real: bool) -> list[str]:
    """Labels that two cases share, and differences in voxel size and orientation."""
    notes = []
    spacings = {_along_patient(case) for case in facts if case.spacing_mm is not None}
    if spacing_is_real and len(spacings) > 1:
        notes.append("voxel sizes differ: set data.target_spacing_mm, so that a voxel means the same everywhere")
    if spacing_is_real and len(spacings) == 1 and set(*spacings) == {1.0}:
        notes.append("every voxel is said to be 1 mm: if sizes were never stored, set data.spacing_is_real: false")
    turns = sorted({case.orientation for case in facts if case.orientation is not None})
    if len(turns) > 1:
        notes.append(f"orientations differ ({', '.join(turns)}): data.orientation turns all to one")
    first: dict[str, CaseFacts] = {}
    for case in facts:
        twin = first.setdefault(case.label_digest, case) if case.label_digest else case
        if twin is not case and twin.images_digest != case.images_digest:
            notes.append(
                f"site {case.site}, case {case.name} has the same label as site {twin.site}, case {twin.name}, on "
                "other images: is one of the two labels the wrong file?"
            )
    return notes


def _along_patient(case: CaseFacts) -> tuple[float, ...]:
    """Voxel sizes in the order left-right, front-back, head-feet; as stored where no orientation is known."""
    sizes = case.spacing_mm or ()
    if case.orientation is None:
        return sizes
    return tuple(sizes[next(at for at, code in enumerate(case.orientation) if code in pair)] for pair in AXIS_CODES)


def value_notes(facts: Sequence[CaseFacts]) -> list[str]:
    """Label values that few cases have, or one site of several alone."""
    read = [case for case in facts if case.channels and not case.problems]
    holders: dict[int, list[CaseFacts]] = {}
    for case in read:
        for label in case.labels:
            holders.setdefault(label.value, []).append(case)
    num_sites = len({case.site for case in read})
    notes = []
    for value, those in sorted(holders.items()):
        if len(read) >= MIN_CASES and len(those) <= max(1, RARE * len(read)):
            names = [f"{case.site}/{case.name}" for case in those]
            where = f"in {len(those)} of {len(read)} cases only ({some(names, MAX_NAMED)})"
        elif num_sites > 1 and len({case.site for case in those}) == 1:
            where = f"at site {those[0].site} only"
        else:
            continue
        notes.append(f"label value {value} is found {where}: is it meant, and in data.labels?")
    return notes
