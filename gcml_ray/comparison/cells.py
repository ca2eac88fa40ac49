"""Methods beside each other: finished cells (method x seed) as small CSV files, and the statistics over them.

A cell's file is tidy: one row a case, class and model, with the cell's own facts repeated in every row, so that
files of several days and machines can simply be laid together.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gcml_ray.errors import DataError
from gcml_ray.files.tables import case_row, case_score
from gcml_ray.files.whole_files import replace_file
from gcml_ray.prediction.averages import mean, site_means
from gcml_ray.records import ENSEMBLE, PERSONALISED, SHARED, CaseScore
from gcml_ray.wording import count

COLUMNS = (
    "method", "seed", "identity", "sent_bytes", "seconds", "num_steps",
    "site", "case", "model", "class_name", "dice", "hd95", "surface_dice",
)  # fmt: skip
LEVEL = 0.95  # of every interval
DIGITS = 6  # of a Dice
EXACT_PAIRS = 12
MIN_CASES = 6  # with 5 even five differences of one sign have p = 2 / 2**5 = 0.06


@dataclass(frozen=True)
class Cell:
    """One finished run of one method with one seed.

    ``identity`` is the configuration's (``Config.identity``), ``sent_bytes`` what all accepted pushes weighed,
    ``num_steps`` the optimiser steps of all models at all sites together; ``scores`` are of test cases.
    """

    method: str
    seed: int
    identity: str
    sent_bytes: int
    seconds: float
    num_steps: int
    scores: tuple[CaseScore, ...]


@dataclass(frozen=True)
class MethodRow:
    """One line of the table: means over seeds; ``dice_sd`` is the sample deviation of the seeds' means (NaN for one).

    ``hd95`` leaves out where it is undefined, as where nothing was predicted; ``num_undefined`` is how often that was.
    ``p_value`` (Holm-corrected) and the interval belong to the difference of this method to the best one, over cases.
    """

    method: str
    model: str
    num_seeds: int
    site_dice: dict[str, float]
    dice: float
    dice_sd: float
    hd95: float
    num_undefined: float
    surface_dice: float
    sent_bytes: float
    seconds: float
    num_steps: float
    difference: float
    low: float
    high: float
    p_value: float


# --- files -------------------------------------------------------------------------------------


def write_cell(path: Path, cell: Cell) -> None:
    """Writes a cell whole or not at all."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    facts = (cell.method, cell.seed, cell.identity, cell.sent_bytes, f"{cell.seconds:.1f}", cell.num_steps)
    for score in cell.scores:
        site, case, _, *rest = case_row(score)
        writer.writerow((*facts, site, case, *rest))
    replace_file(path, buffer.getvalue())


def read_cell(path: Path) -> Cell:
    """Reads a cell back.

    Raises:
        DataError: the file is not one that :func:`write_cell` wrote.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            raise ValueError("it ends within a row")
        rows = list(csv.DictReader(io.StringIO(text)))
        first = rows[0]
        scores = tuple(case_score(row | {"split": "test"}) for row in rows)
        if len({tuple(row[name] for name in COLUMNS[:6]) for row in rows}) > 1:
            raise ValueError("it has rows of several cells")
        if len({(score.site, score.case, score.model, score.class_name) for score in scores}) < len(rows):
            raise ValueError("it has a score twice")
        if any(math.isnan(score.dice) for score in scores):
            raise ValueError("it has a score without Dice")
        return Cell(
            first["method"], int(first["seed"]), first["identity"], int(first["sent_bytes"]),
            float(first["seconds"]), int(first["num_steps"]), scores,
        )  # fmt: skip
    except (IndexError, KeyError, ValueError, csv.Error) as error:
        raise DataError(f"{path} is not a cell of a comparison ({error!r}); delete it to have it run again") from error


def check_same_cases(cells: Mapping[Path, Cell]) -> None:
    """Whether all were scored on the same cases and classes, else nothing can be paired.

    Raises:
        DataError: two were not; names them and what one has alone.
    """
    scored = {path: {(s.site, s.case, s.class_name) for s in cell.scores} for path, cell in cells.items()}
    if not scored:
        return
    (first, expected), *others = scored.items()
    for path, found in others:
        if alone := sorted(found ^ expected):
            owner = path if alone[0] in found else first
            raise DataError(
                f"{first} and {path} were scored on different cases: {' / '.join(alone[0])} is only in {owner}"
                f"{f', and {len(alone) - 1} more differ' if len(alone) > 1 else ''}. The datalist has changed between "
                "them, or a file is cut off: bring the datalist back, or delete the cells made with another one"
            )


# --- statistics --------------------------------------------------------------------------------


def dice_over_seeds(cells: Sequence[Cell], model: str) -> dict[tuple[str, str], float]:
    """Dice of each (site, case), averaged over seeds and classes: the pairs of the test."""
    values: dict[tuple[str, str], list[float]] = {}
    for cell in cells:
        for score in cell.scores:
            if score.model == model:
                values.setdefault((score.site, score.case), []).append(score.dice)
    return {key: mean(numbers) for key, numbers in sorted(values.items())}


Group = tuple[Sequence[Cell], str]  # a method's cells and which of its models is meant


def differences_by_site(one: Group, other: Group) -> dict[str, NDArray[np.float64]]:
    """Per site: Dice of ``one`` minus Dice of ``other``, (N,), over the N cases and the seeds that both have.

    Seeds that only one of them has are left out: they differ in initial weights and in the order of the data. What
    differs by rounding alone (a Dice in float32, a mean over seeds) is equal.
    """
    seeds = {cell.seed for cell in one[0]} & {cell.seed for cell in other[0]}
    first, second = (
        dice_over_seeds([cell for cell in cells if cell.seed in seeds], model) for cells, model in (one, other)
    )
    by_site: dict[str, list[float]] = {}
    for site, case in sorted(first.keys() & second.keys()):
        by_site.setdefault(site, []).append(first[site, case] - second[site, case])
    return {site: np.round(differences, DIGITS) for site, differences in by_site.items()}


def differences_of_methods(cells: Sequence[Cell], method: str, other: str) -> dict[str, NDArray[np.float64]]:
    """:func:`differences_by_site` of two methods' personalised models."""
    one, two = (([cell for cell in cells if cell.method == name], PERSONALISED) for name in (method, other))
    return differences_by_site(one, two)


def summarise(cells: Sequence[Cell], *, bounds: Collection[str] = ()) -> tuple[MethodRow, ...]:
    """One row a method and evaluated model, best mean Dice first, and the bounds behind all others.

    The mean Dice is the mean over sites of the site's mean over cases and classes, so that a small hospital counts
    as much as a large one. Each row is compared with the best over the cases and seeds both have: Wilcoxon's
    signed-rank test, two-sided, Holm-corrected over the rows (Holm 1979), and an interval of the difference of those
    means (:func:`mean_interval`).

    Args:
        cells: what is finished.
        bounds: methods that train on all sites' cases together.
    """
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        for model in sorted({score.model for score in cell.scores} & {PERSONALISED, ENSEMBLE, SHARED}):
            groups.setdefault((cell.method, model), []).append(cell)
    sites = sorted({score.site for cell in cells for score in cell.scores})
    rows = [_row(*key, group, sites) for key, group in groups.items()]
    rows.sort(key=lambda row: (row.method in bounds, -row.dice))
    if not rows:
        return ()
    best, *others = [(groups[row.method, row.model], row.model) for row in rows]
    compared = [_against(row, differences_by_site(own, best)) for row, own in zip(rows[1:], others, strict=True)]
    corrected = holm([row.p_value for row in compared])
    return (rows[0], *(replace(row, p_value=p_value) for row, p_value in zip(compared, corrected, strict=True)))


def _row(method: str, model: str, cells: Sequence[Cell], sites: Sequence[str]) -> MethodRow:
    """The means of a method over its seeds; a site's over those that have it, NaN where none has."""
    own = [[score for score in cell.scores if score.model == model] for cell in cells]
    by_seed = [site_means(scores) for scores in own]
    means = [mean(seed.values()) for seed in by_seed]
    return MethodRow(
        method=method,
        model=model,
        num_seeds=len(cells),
        site_dice={site: mean(seed[site] for seed in by_seed if site in seed) for site in sites},
        dice=mean(means),
        dice_sd=float(np.std(means, ddof=1)) if len(means) > 1 else math.nan,
        hd95=mean(mean(site_means(scores, lambda score: score.hd95).values()) for scores in own),
        num_undefined=mean(sum(math.isnan(score.hd95) for score in scores) for scores in own),
        surface_dice=mean(mean(site_means(scores, lambda score: score.surface_dice).values()) for scores in own),
        sent_bytes=mean(cell.sent_bytes for cell in cells),
        seconds=mean(cell.seconds for cell in cells),
        num_steps=mean(cell.num_steps for cell in cells),
        difference=0.0,
        low=math.nan,
        high=math.nan,
        p_value=math.nan,
    )


def _against(row: MethodRow, differences: Mapping[str, NDArray[np.float64]]) -> MethodRow:
    """The row with its difference to the best method; NaN where they have no seed in common."""
    if not differences:
        return replace(row, difference=math.nan, p_value=1.0)
    by_site = list(differences.values())
    of_all = np.concatenate(by_site)
    low, high = mean_interval(by_site)
    return replace(
        row,
        difference=float(np.mean([part.mean() for part in by_site])),
        low=low,
        high=high,
        p_value=signed_rank_p(of_all),
    )


def signed_rank_p(differences: NDArray[np.float64]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test of paired differences, (N,).

    Zeros are left out, as Wilcoxon did; 1 where there is nothing else. Of few the p is exact also where some are equal
    in size, for which SciPy by itself takes the normal approximation.
    """
    from scipy.stats import PermutationMethod, wilcoxon  # noqa: PLC0415 - most of a second; every command comes here

    others = differences[differences != 0]
    if not others.size:
        return 1.0
    has_ties = np.unique(np.abs(others)).size < others.size
    all_signs = PermutationMethod(n_resamples=2**EXACT_PAIRS)  # exact: SciPy takes each of the 2^N once
    return float(wilcoxon(others, method=all_signs if has_ties and others.size <= EXACT_PAIRS else "auto").pvalue)


def mean_interval(by_site: Sequence[NDArray[np.float64]]) -> tuple[float, float]:
    """95 % interval of the mean over sites of the sites' mean differences, of (N,) cases each: Student's t.

    Sites may differ in spread: Welch's degrees of freedom, for a mean of means (Biometrika 34, 1947). NaN where a site
    has one case. Not the percentile bootstrap, which is narrower still for few cases: docs/comparison.md has
    how often either leaves out 0 without any true difference (``benchmarks/intervals.py``).
    """
    from scipy.stats import t  # noqa: PLC0415 - as above

    center = float(np.mean([part.mean() for part in by_site]))
    if min(len(part) for part in by_site) < 2:
        return math.nan, math.nan
    variances = np.array([part.var(ddof=1) / len(part) for part in by_site])
    if not variances.any():
        return center, center
    freedom = variances.sum() ** 2 / sum(
        variance**2 / (len(part) - 1) for variance, part in zip(variances, by_site, strict=True)
    )
    half = float(t.ppf((1 + LEVEL) / 2, freedom) * np.sqrt(variances.sum())) / len(by_site)
    return center - half, center + half


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Scandinavian Journal of Statistics 6, 1979), in the order given."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def site_verdicts(cells: Sequence[Cell], *, method: str, alone: str) -> tuple[str, ...]:
    """In words, for all sites together and then for each: is joining better than training alone, by how much, how sure.

    A site is told to be better or worse off where the interval of its mean difference (:func:`mean_interval`) leaves
    out 0, and never with fewer than :data:`MIN_CASES` test cases.
    """
    by_site = differences_of_methods(cells, method, alone)
    if not by_site:
        return ()
    told = {site: _verdict(differences) for site, differences in by_site.items()}
    counts = {word: [site for site in told if told[site][0] == word] for word in ("better", "worse", "unsure")}
    summary = (
        f"{method} against {alone}: better at {len(counts['better'])} of {count(len(told), 'site')}, worse at "
        f"{len(counts['worse'])}, not told apart at {len(counts['unsure'])}"
    )
    sentences = {
        "better": f"{method} is better than {alone}",
        "worse": f"{method} is worse than {alone}",
        "unsure": f"{method} and {alone} are not told apart",
    }
    return (summary, *(f"{site}: {sentences[word]}, {numbers}" for site, (word, numbers) in told.items()))


def _verdict(differences: NDArray[np.float64]) -> tuple[Literal["better", "worse", "unsure"], str]:
    """One site's verdict, and the numbers behind it."""
    num_cases = count(len(differences), "test case")
    mean_points = f"{100 * differences.mean():+.1f} Dice points"
    if len(differences) < MIN_CASES:
        return "unsure", f"{mean_points}: {num_cases}, too few to tell"
    low, high = mean_interval([differences])
    numbers = f"{mean_points} (95 % interval {100 * low:+.1f} to {100 * high:+.1f}, {num_cases})"
    return ("better" if low > 0 else "worse" if high < 0 else "unsure"), numbers
