"""What lying sites do to the honest ones on the phantom: Dice alone, in peace, and under each attack.

Each attack runs with and without the defence (``defence.weights``, ``defence.validation``); ``impersonate`` with and
without signatures (``wire.sign``). Prints a Markdown table; honest sites alone count.

    python -m benchmarks.attacks --rounds 12 --steps 10
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.listener import NullListener
from actors.run import run_federation
from gcml_ray.chaos import parse_chaos
from gcml_ray.config import Config
from gcml_ray.config.file import parse_config
from gcml_ray.data.datalist import write_datalist
from gcml_ray.data.phantom import prepare_phantom
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.prediction.averages import mean
from gcml_ray.records import PERSONALISED, RoundRecord

SHAPE = (36, 32, 20)
FOUR = ("random:west", "flip:west", "scale:westx100", "nan_push:west", "labels:west", "replay:west")
IMPERSONATED = "impersonate:west->east"
EIGHT = "flip:site3, labels:site4"
OFF = {"weights": False, "validation": False}


@dataclass(frozen=True)
class Outcome:
    """One run: mean Dice of the honest sites, and how many pushes of liars and of honest sites they refused."""

    dice: float
    refused: int
    pushes: int
    honest_refused: int


def sites_of(num_sites: int) -> tuple[str, ...]:
    """The phantom's four sites, and further ones."""
    return ("north", "east", "south", "west", *(f"site{number}" for number in range(1, num_sites - 3)))


def make_config(folder: Path, options: argparse.Namespace, *, name: str, num_sites: int, **sections: Any) -> Config:
    """The federation of ``configs/phantom.yaml``, shorter, mixing before the mutual steps."""
    datalist = folder / f"datalist_{num_sites}.json"
    if not datalist.exists():
        cases = prepare_phantom(
            folder / f"volumes_{num_sites}",
            sites=sites_of(num_sites),
            cases_per_site=None,
            shape=SHAPE,
            seed=options.seed,
        )
        write_datalist(datalist, cases, description="benchmark")
    values: dict[str, Any] = {
        "name": name,
        "data": {
            "datalist": str(datalist),
            "channels": ["t1", "flair"],
            "labels": {"background": 0, "lesion": 1},
            "spacing_is_real": True,
            "patch_size": list(SHAPE),
            "batch_size": 2,
        },
        "network": {"name": "unet", "options": {"channels": [8, 16, 32], "strides": [2, 2], "num_res_units": 1}},
        "loss": {"include_background": False},
        "optimiser": {"learning_rate": 4e-3},
        "method": {
            "name": "gcml",
            "topology": {"name": "push_k", "k": 1},
            "merge_first": "size_weighted",
            "merge": "keep_local",
        },
        "federation": {
            "rounds": options.rounds,
            "local_steps": options.steps,
            "warmup_rounds": options.rounds // 5,
            "cooldown_rounds": 0,
            "evaluate_every": 3,
            "seed": options.seed,
        },
        "resources": {"pool": "local"},
        "tracking": {"enabled": False},
        "output": {"folder": str(folder / name), "num_overlays": 0, "checkpoint_every": options.rounds},
    }
    return parse_config(values | sections, (), source="benchmark")


def run(config: Config, *, liars: Sequence[str]) -> Outcome:
    """Runs a federation and looks at it through the eyes of its honest sites."""
    summary = run_federation(config, listener=NullListener(), stop=threading.Event())
    dice = mean(
        score.dice
        for report in summary.evaluations
        for score in report.scores
        if report.model == PERSONALISED and score.site not in liars
    )
    verdicts = [verdict for record in RunFolder(Path(config.output.folder)).rounds() for verdict in _verdicts(record)]
    of_liars = [accepted for sender, receiver, accepted in verdicts if sender in liars and receiver not in liars]
    honest = [accepted for sender, receiver, accepted in verdicts if sender not in liars and receiver not in liars]
    return Outcome(dice, of_liars.count(False), len(of_liars), honest.count(False))


def _verdicts(record: RoundRecord) -> Iterator[tuple[str, str, bool]]:
    """(sender, receiver, accepted) of every push that was planned; what came under another name was not accepted."""
    judged = {(one.sender, report.site): one.accepted for report in record.trained for one in report.judged}
    taken = {(push.sender, push.receiver) for push in record.pushes if push.accepted}
    for edge in record.plan.edges:
        pair = (edge.sender, edge.receiver)
        yield *pair, judged.get(pair, pair in taken)


def rows(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """The table's rows, as they are ready."""
    attacks = [(4, text) for text in (*FOUR, IMPERSONATED)] + ([(8, EIGHT)] if options.eight else [])
    references: dict[int, str] = {}
    for index, (num_sites, text) in enumerate(attacks):
        liars = [fault.site for fault in parse_chaos(text)]

        def outcome(name: str, **sections: Any) -> Outcome:
            config = make_config(folder, options, name=f"{name}_{index}", num_sites=num_sites, **sections)  # noqa: B023
            return run(config, liars=liars)  # noqa: B023

        if num_sites not in references:
            alone, peace = outcome("alone", method={"name": "local"}), outcome("peace")
            references[num_sites] = f"{alone.dice:.3f} | {peace.dice:.3f} ({peace.honest_refused} refused)"
        without = outcome("open", chaos=text, defence=OFF, wire={"sign": False})
        defended = outcome("defended", chaos=text, wire={"sign": text == IMPERSONATED})
        yield (
            f"| {num_sites} | `{text}` | {references[num_sites]} | {without.dice:.3f} | {defended.dice:.3f} "
            f"| {defended.refused} of {defended.pushes} | {defended.honest_refused} |"
        )


def main() -> None:
    """Runs all of it and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eight", action="store_true", help="two liars of eight sites as well")
    options = parser.parse_args()
    say = sys.stdout.write
    say("| sites | attack | alone | no attack | undefended | defended | refused pushes of liars | of honest sites |\n")
    say("|---|---|---|---|---|---|---|---|\n")
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(Path(folder), options):
            say(f"{row}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
