"""What a search costs: what the scheduler saves, and what Ray Tune adds to a bare federation.

``asha`` runs the same trials twice (random search: same values, same seeds), with ASHA and without a scheduler, and
reports seconds and federation rounds until the best score of all trials was reached, and until the end. ``overhead``
runs one federation several times by itself and as trials, one at a time, and reports seconds each. Both write a
Markdown table and a CSV file into ``--out``.

    python -m benchmarks.search asha --trials 12
    python -m benchmarks.search overhead --trials 5
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

from actors.listener import NullListener
from actors.run import ray_session, run_federation
from gcml_ray.data.datalist import write_datalist
from gcml_ray.data.phantom import prepare_phantom
from gcml_ray.search.records import SearchRecord, TrialRecord
from tune.search import run_search
from tune.search_file import load_search
from tune.trial_config import Search, base_params, trial_config

ROOT = Path(__file__).parents[1]
SITES = ("north", "east", "south", "west")
SPACE = yaml.safe_load((ROOT / "configs/tune_phantom.yaml").read_text(encoding="utf-8"))["space"]
ALL_BUT_SAME = {"method.dcml.lambda": {"name": "uniform", "low": 0.1, "high": 0.1 + 1e-9}}


@dataclass(frozen=True)
class AshaRow:
    """One search. ``seconds_to_best`` and ``rounds_to_best``: None where it never reached the best score."""

    scheduler: str
    trials: int
    cut: int
    best_score: float
    seconds_to_best: float | None
    rounds_to_best: int | None
    seconds: float
    rounds: int


@dataclass(frozen=True)
class OverheadRow:
    """A federation by itself or as a trial: seconds each from its start to its end, processes included."""

    what: str
    runs: int
    seconds: float
    sd: float
    of_it_rounds: float


class Stopwatch:
    """A view of a search that keeps when each trial was in which state."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.events: list[tuple[float, TrialRecord]] = []

    def on_trial(self, trial: TrialRecord) -> None:
        """Keeps it."""
        self.events.append((time.perf_counter() - self.began, trial))

    def reached(self, score: float) -> tuple[float, int] | tuple[None, None]:
        """Seconds and rounds of all trials until one had a score; the trials are the same to the last bit."""
        rounds: dict[int, int] = {}
        for seconds, trial in self.events:
            rounds[trial.number] = trial.last_round
            if trial.points and trial.value("mean_dice") >= score:
                return seconds, sum(rounds.values())
        return None, None

    def between_ends(self) -> list[float]:
        """Seconds from the end of a trial to that of the next; the first one's count from the search's start."""
        ends = [seconds for seconds, trial in self.events if trial.status == "finished"]
        return [end - start for start, end in zip([0.0, *ends], ends, strict=False)]


def make_search(folder: Path, options: argparse.Namespace, *, name: str, **keys: Any) -> Search:
    """Random trials of ``configs/phantom.yaml``, shorter, over a Ray of its own."""
    datalist = folder / "datalist.json"
    if not datalist.exists():
        cases = prepare_phantom(folder / "volumes", sites=SITES, cases_per_site=None, shape=(36, 32, 20), seed=11)
        write_datalist(datalist, cases, description="benchmark")
    values = {
        "name": name,
        "base": str(Path("configs/phantom.yaml").resolve()),
        "folder": str(folder / name),
        "searcher": {"name": "random", "seed": options.seed},
        "budget": {"trials": options.trials, "concurrent_trials": options.at_once},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values | keys), encoding="utf-8")
    overrides = [f"data.datalist={datalist}", "resources.address=local", "tracking.enabled=false"]
    overrides += [f"federation.rounds={options.rounds}", f"federation.local_steps={options.steps}"]
    return load_search(path, (), (*overrides, "federation.evaluate_every=2"))


def searched(search: Search) -> tuple[SearchRecord, Stopwatch, float]:
    """A search, its events and its seconds, connecting to Ray aside."""
    with ray_session(search.base):
        watch = Stopwatch()
        stop = threading.Event()
        record = run_search(search, views=(watch,), stop=stop)
        seconds = time.perf_counter() - watch.began
    reasons = {trial.reason for trial in record.trials if trial.status == "failed"}
    if stop.is_set():
        raise SystemExit("stopped: nothing was measured")
    if reasons:
        raise SystemExit(f"trials failed: {'; '.join(sorted(reasons))}")
    return record, watch, seconds


def asha(folder: Path, options: argparse.Namespace) -> list[AshaRow]:
    """The same trials without a scheduler and with ASHA."""
    schedulers: dict[str, dict[str, Any]] = {
        "none": {"name": "none"},
        "asha": {"name": "asha", "grace_rounds": options.grace, "reduction_factor": 2},
    }
    rows: list[AshaRow] = []
    score = 0.0
    for name, scheduler in schedulers.items():
        search = make_search(folder, options, name=name, space=SPACE, scheduler=scheduler)
        record, watch, seconds = searched(search)
        own_best = max((trial.value("mean_dice") for trial in record.trials if trial.status == "finished"), default=0.0)
        score = score or own_best  # that of the search that ran every trial to its end
        cut = sum(trial.status == "cut" for trial in record.trials)
        rounds = sum(trial.last_round for trial in record.trials)
        rows.append(AshaRow(name, len(record.trials), cut, own_best, *watch.reached(score), seconds, rounds))
        print(rows[-1], flush=True)
    return rows


def overhead(folder: Path, options: argparse.Namespace) -> list[OverheadRow]:
    """The same federation by itself and as trials, one at a time."""
    search = make_search(folder, options, name="trials", space=ALL_BUT_SAME, scheduler={"name": "none"})
    bare, rounds = [], []
    with ray_session(search.base):
        for number in range(options.trials):
            config = trial_config(search, base_params(search), folder=folder / f"bare{number}")
            began = time.perf_counter()
            run_federation(config, listener=RoundClock(rounds), stop=threading.Event(), test=False)
            bare.append(time.perf_counter() - began)
            print(f"bare {bare[-1]:.1f} s", flush=True)
    record, watch, _ = searched(search)
    trials = watch.between_ends()
    print(f"trials {[round(seconds, 1) for seconds in trials]} s", flush=True)
    in_rounds = [trial.points[-1].seconds for trial in record.trials if trial.points]
    return [
        OverheadRow("by itself", len(bare), fmean(bare), _sd(bare), sum(rounds) / len(bare)),
        OverheadRow("as a trial", len(trials), fmean(trials), _sd(trials), fmean(in_rounds)),
    ]


class RoundClock(NullListener):
    """Adds up the seconds of rounds.

    Args:
        seconds: takes those of each round.
    """

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds

    def on_round_end(self, record: Any) -> None:
        """Notes them."""
        self.seconds.append(record.seconds)


def _sd(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def write(rows: Sequence[AshaRow | OverheadRow], out: Path, *, name: str, words: str) -> str:
    """The rows as ``NAME.csv`` and, with words below, as ``NAME.md``; returns the latter."""
    plain = [asdict(row) for row in rows]
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(plain[0]))
        writer.writeheader()
        writer.writerows(plain)
    lines = ["| " + " | ".join(key.replace("_", " ") for key in plain[0]) + " |", "|---" * len(plain[0]) + "|"]
    lines += ["| " + " | ".join(_cell(key, value) for key, value in row.items()) + " |" for row in plain]
    text = "\n".join([*lines, "", words, ""])
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    return text


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "never"
    return f"{value:.4f}" if key == "best_score" else f"{value:.1f}" if isinstance(value, float) else str(value)


def asha_words(rows: Sequence[AshaRow], command: str) -> str:
    """What ASHA saved, in a sentence, below the command."""
    none, cut = rows
    saved = f"ASHA ran {cut.rounds} of {none.rounds} rounds in {cut.seconds / none.seconds:.0%} of the time"
    lost = none.best_score - cut.best_score
    if cut.seconds_to_best is None or none.seconds_to_best is None:
        found = f"It cut the best trial; its own best is {lost:.4f} lower."
    else:
        found = f"The best score was there after {cut.seconds_to_best / none.seconds_to_best:.0%} of the time."
    return f"{saved}. {found}\n\nMade by `{command}`."


def overhead_words(rows: Sequence[OverheadRow], command: str) -> str:
    """What Ray Tune adds, in a sentence, above the command."""
    bare, trial = rows
    outside = (trial.seconds - trial.of_it_rounds) - (bare.seconds - bare.of_it_rounds)
    return (
        f"A trial takes {trial.seconds - bare.seconds:+.1f} s against the federation by itself "
        f"({trial.seconds / bare.seconds - 1:+.0%}); outside of its rounds, {outside:+.1f} s: a process for its driver "
        f"and a placement group.\n\nMade by `{command}`."
    )


def main() -> None:
    """Runs one of the two and prints its table."""
    options = _options()
    command = (
        f"python -m benchmarks.search {options.what} --trials {options.trials} --rounds {options.rounds} "
        f"--steps {options.steps} --at-once {options.at_once}"
    )
    with tempfile.TemporaryDirectory() as scratch:
        if options.what == "asha":
            rows = asha(Path(scratch), options)
            print(write(rows, options.out, name="search_asha", words=asha_words(rows, command)))
        else:
            measured = overhead(Path(scratch), options)
            words = overhead_words(measured, command)
            print(write(measured, options.out, name="search_overhead", words=words))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("asha", "overhead"))
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5, help="local steps of a round")
    parser.add_argument("--grace", type=int, default=4, help="rounds before ASHA may cut a trial")
    parser.add_argument("--at-once", type=int, default=1, help="trials at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
