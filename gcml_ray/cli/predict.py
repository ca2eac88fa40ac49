"""``gcml predict`` and ``gcml evaluate``: a run's models on new patients, and files scored against references."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from gcml_ray.config import POOLED, Config
from gcml_ray.config.file import load_config
from gcml_ray.console.progress import bar_of_cases, counted
from gcml_ray.console.terminal import terminal
from gcml_ray.data.datalist import SPLITS, Case, cases_of_site, read_datalist, site_names
from gcml_ray.data.pooling import as_pooled
from gcml_ray.errors import ConfigError, DataError, GcmlError
from gcml_ray.files.folder_lock import check_writable
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.files.tables import case_table
from gcml_ray.files.whole_files import replace_file
from gcml_ray.records import CaseScore, Split
from gcml_ray.training.known_cases import check_splits
from gcml_ray.wording import some

if TYPE_CHECKING:
    from gcml_ray.data.image_cases import FoundCases
    from gcml_ray.prediction.predict import PersonalModel

log = logging.getLogger(__name__)

Run = Annotated[Path, typer.Option("--run", help="Folder of a finished run.")]
SplitOption = Annotated[str | None, typer.Option("--split", help="Only these cases: train, validation or test.")]
MAX_NAMED = 5


# --- predict -----------------------------------------------------------------------------------


def predict(
    run: Annotated[Path, typer.Option("--run", help="Folder of a finished run, or of an exported model.")],
    images: Annotated[list[Path], typer.Option(help="Folder, datalist (.json) or image file; repeat it for several.")],
    out: Annotated[Path, typer.Option(help="Folder for the label files.")],
    site: Annotated[str | None, typer.Option(help="Whose personalised model; an exported one has one site.")] = None,
    flips: Annotated[bool, typer.Option("--flips", help="Average over all flips: slower, often steadier.")] = False,
    ensemble: Annotated[bool, typer.Option("--ensemble", help="Average with the other sites' models.")] = False,
    peers: Annotated[bool, typer.Option("--peers", help="Average with the models that the site chose.")] = False,
    largest_component: Annotated[
        bool, typer.Option("--largest-component", help="Keep the largest piece of each class alone.")
    ] = False,
    split: SplitOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace label files that exist.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1...")] = "cpu",
) -> None:
    """Segment new images with a site's personalised model, each on its own grid."""
    from gcml_ray.data.image_cases import find_cases  # noqa: PLC0415 - torch only when a model runs
    from gcml_ray.prediction.load import load_model  # noqa: PLC0415

    console = terminal()
    model = load_model(run, site, device=device, ensemble=ensemble, peers=peers)
    found = find_cases(images, model.config.data, site=site or model.facts[0].site, split=_split(split))
    if split is not None:
        _check_splits(run, model.config, found.cases, images[0])
    _say_what(console, model, found)
    todo, skipped = _to_do(found.cases, out, model, overwrite=overwrite)
    if todo:
        check_writable(out, key="--out")
    problems = list(found.problems)
    for each in found.problems:
        _say_failed(console, each)
    with bar_of_cases(console) as bar:
        task = bar.add_task("predict", total=len(todo))
        for case in todo:
            bar.update(task, description=case.name)
            problem = _predict_one(model, case, out, flips=flips, largest_component=largest_component)
            if problem:
                problems.append(problem)
                _say_failed(console, problem)
            elif not console.is_terminal:
                console.print(f"predicted: {case.name}")
            bar.advance(task)
    done = len(todo) - (len(problems) - len(found.problems))
    note = f", {skipped} skipped (their files exist; --overwrite replaces them)" if skipped else ""
    console.print(f"{done} predicted, {len(problems)} failed{note} -> {out}")
    if problems:
        raise typer.Exit(1)


def _say_what(console: Console, model: PersonalModel, found: FoundCases) -> None:
    """Which model predicts, and what was left out."""
    for facts in model.facts:
        dice = f", validation Dice {float(facts.validation_dice):.3f}" if facts.validation_dice else ""
        line = f"model of site {facts.site}: {facts.method}, round {facts.round_number}{dice}"
        console.print(line)
    for note in found.notes:
        console.print(f"note: {note}")


def _to_do(cases: Sequence[Case], out: Path, model: PersonalModel, *, overwrite: bool) -> tuple[list[Case], int]:
    """The cases to predict, and how many are left out because their files exist."""
    from gcml_ray.prediction.label_files import output_paths  # noqa: PLC0415 - torch only when a model runs

    if out.resolve() in {Path(image).resolve().parent for case in cases for image in case.images}:
        raise ConfigError(
            f"--out {out} is the folder of the images: label files among them would be taken for images, or replace "
            "them; give another folder"
        )
    paths = {case: list(output_paths(out, case.name, case.images[0], model.config.data).values()) for case in cases}
    done = {} if overwrite else {case: each for case, each in paths.items() if all(path.exists() for path in each)}
    _check_own(done, out, model.facts[0].site)
    return [case for case in cases if case not in done], len(done)


def _check_own(existing: Mapping[Case, Sequence[Path]], out: Path, site: str) -> None:
    """Refuses to skip existing label files that another site's model made."""
    from gcml_ray.prediction.label_files import LONGEST_NOTED, site_that_made  # noqa: PLC0415 - torch only when a model runs

    makers = {path: site_that_made(path) for paths in existing.values() for path in paths}
    foreign = [path for path, maker in makers.items() if maker not in (None, site[:LONGEST_NOTED])]
    if foreign:
        raise ConfigError(
            f"--out {out}: {len(foreign)} file(s) are there from another site's model, {foreign[0]} from that of site "
            f"{makers[foreign[0]]}, not {site}; give another folder, or replace them with --overwrite"
        )


def _predict_one(model: PersonalModel, case: Case, out: Path, *, flips: bool, largest_component: bool) -> str | None:
    """Predicts one case; what went wrong, in one line, where something did. The folder goes on either way."""
    try:
        model.predict_case(case, out, flips=flips, largest_component=largest_component)
    except (GcmlError, OSError) as error:
        file = "" if case.images[0] in str(error) else f" ({case.images[0]})"
        return f"{case.name}{file}: {error}"
    except (RuntimeError, MemoryError, ValueError) as error:
        log.debug("case %s", case.name, exc_info=True)
        advice = "use --device cpu or a smaller evaluation.window_batch" if "memory" in str(error) else "check the file"
        reason = str(error).partition("\n")[0]
        return f"{case.name} ({case.images[0]}): {type(error).__name__}: {reason}; {advice}"
    return None


def _say_failed(console: Console, problem: str) -> None:
    console.print(f"failed: {problem}", style="red")


# --- evaluate ----------------------------------------------------------------------------------


def evaluate(
    run: Run,
    predictions: Annotated[Path, typer.Option(help="Folder with <case>.nii.gz or <site>/<case>.nii.gz.")],
    datalist: Annotated[Path, typer.Option(help="Cases with their reference labels (.json).")],
    site: Annotated[str | None, typer.Option(help="Only this site's cases.")] = None,
    split: SplitOption = None,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="Write every case's scores here (CSV).")] = None,
) -> None:
    """Score label files against references, each on its own grid."""
    from gcml_ray.prediction.score_files import score_files  # noqa: PLC0415 - torch only when there is something to score

    console = terminal()
    config = load_config(RunFolder.open(run).config_file)
    cases = _reference_cases(datalist, config, run, site=site, split=_split(split))
    if not predictions.is_dir():
        raise DataError(f"--predictions {predictions}: no such folder")
    if out is not None:
        check_writable(out.parent, key="--out")
    with counted(terminal(is_error=True), "scored") as progress:
        result = score_files(cases, predictions, config, on_progress=progress)
    for problem in result.problems:
        _say_failed(console, problem)
    if result.missing:
        names = [f"{case.site}/{case.name}" for case in result.missing]
        console.print(f"without a prediction: {some(names, MAX_NAMED)}")
    if result.scores:
        console.print(_score_table(result.scores, unit=config.data.distance_unit))
    if out is not None and result.scores:
        replace_file(out, case_table(result.scores))
    scored = len({(score.site, score.case) for score in result.scores})
    counts = f"{scored} scored, {len(result.problems)} failed, {len(result.missing)} without a prediction"
    console.print(counts)
    if result.problems or not scored or (split is not None and result.missing):
        raise typer.Exit(1)


def _reference_cases(
    datalist: Path, config: Config, run: Path, *, site: str | None, split: Split | None
) -> tuple[Case, ...]:
    """The cases to score. Splits left open are those of training where the run itself, or --split, asks for them."""
    from gcml_ray.data.image_cases import with_splits  # noqa: PLC0415 - torch only when there is something to score

    cases = read_datalist(datalist)
    if site is not None:
        cases = cases_of_site(cases, site) or _no_such_site(datalist, cases, site)
    if split is not None or datalist.resolve() == Path(config.data.datalist).resolve():
        cases = with_splits(cases, config.data)
        _check_splits(run, config, [case for case in cases if split in (None, case.split)], datalist)
    chosen = tuple(case for case in cases if split in (None, case.split))
    if not chosen:
        raise DataError(f"{datalist}: no case has the split {split}")
    return tuple(replace(case, split=case.split or "test") for case in chosen)


def _check_splits(run: Path, config: Config, cases: Sequence[Case], source: Path) -> None:
    """Splits must be those of the run, as far as its folder knows them."""
    if config.method.name == POOLED:
        cases = [as_pooled(case) for case in cases]
    for site in site_names(cases):
        check_splits(RunFolder(run).checkpoints(site), cases_of_site(cases, site), source=str(source))


def _no_such_site(datalist: Path, cases: Sequence[Case], site: str) -> tuple[Case, ...]:
    raise DataError(f"{datalist}: no case is of site {site}; sites are {', '.join(site_names(cases))}")


def _score_table(scores: Sequence[CaseScore], *, unit: str) -> Table:
    """Mean and standard deviation by site, split and class."""
    from gcml_ray.prediction.metrics import summarise  # noqa: PLC0415 - torch only when there is something to score

    table = Table(title="Scores on the grid of the files: mean (standard deviation)", title_justify="left")
    for heading in ("site", "split", "class"):
        table.add_column(heading)
    for heading in ("cases", "Dice", f"HD95 ({unit})", "surface Dice"):
        table.add_column(heading, justify="right")
    for row in summarise(scores):
        dice = _mean_sd(row.dice_mean, row.dice_sd)
        hd95 = _mean_sd(row.hd95_mean, row.hd95_sd, digits=1)
        hd95 += f", {row.num_undefined_hd95} without" if row.num_undefined_hd95 else ""
        surface = _mean_sd(row.surface_dice_mean, row.surface_dice_sd)
        table.add_row(row.site, row.split, row.class_name, str(row.num_cases), dice, hd95, surface)
    return table


def _mean_sd(mean: float, sd: float, *, digits: int = 3) -> str:
    if math.isnan(mean):
        return "-"
    return f"{mean:.{digits}f}" if math.isnan(sd) else f"{mean:.{digits}f} ({sd:.{digits}f})"


def _split(name: str | None) -> Split | None:
    if name is not None and name not in SPLITS:
        raise ConfigError(f"--split {name!r} is unknown; allowed are {', '.join(SPLITS)}")
    return name
