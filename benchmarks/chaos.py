"""A soak: federations over Ray with faults and killed drivers at random; each must end whole, as if undisturbed.

An episode is one run of the phantom over Ray with one or two faults (kill, hang, raise, NaN, out of memory, full disk,
slow), or with its driver killed by SIGKILL and resumed; before some resumes a checkpoint is cut short. After it:
the run has finished, every round is on disk, no process of its cluster is left, and the sites that were spared are
within a point of Dice of an undisturbed run. Prints a Markdown table.

    python -m benchmarks.chaos --minutes 10 --seed 0
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import yaml

from gcml_ray.averages import mean
from gcml_ray.checkpoint import saved_rounds
from gcml_ray.data.datalist import write_datalist
from gcml_ray.data.phantom import prepare_phantom
from gcml_ray.records import PERSONALISED
from gcml_ray.run_folder import RunFolder

SITES = ("north", "east", "south", "west")
ROUNDS = 10
KINDS = ("kill", "hang", "raise", "nan", "oom", "disk", "slow", "driver", "driver+corrupt")
EPISODE_LIMIT_S = 300.0
TOLERANCE = 0.01  # of Dice, for sites that were spared


@dataclass(frozen=True)
class Episode:
    """What was done to a run, and what became of it. ``problem`` is empty where all went as it should."""

    kinds: tuple[str, ...]
    problem: str
    seconds: float
    lost_rounds: int


def main() -> None:
    """Runs episodes for as long as asked for and prints what came of them."""
    options = _options()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(Path(folder), local_steps=options.steps, mode=options.mode)
        calm = Path(folder) / "calm"
        run(config, calm, "").communicate(timeout=EPISODE_LIMIT_S)
        undisturbed = dice_by_site(calm)
        print(f"undisturbed: {undisturbed}", flush=True)
        episodes: list[Episode] = []
        until = time.monotonic() + 60 * options.minutes
        while time.monotonic() < until:
            done = episode(config, Path(folder) / f"run{len(episodes)}", rng, undisturbed)
            episodes.append(done)
            state = done.problem or "survived"
            print(f"{len(episodes)}. {'+'.join(done.kinds)}: {state} ({done.seconds:.0f} s)", flush=True)
    print(table(episodes))
    sys.exit(any(done.problem for done in episodes))


def make_config(folder: Path, *, local_steps: int, mode: str) -> Path:
    """The federation of ``configs/phantom.yaml``, shorter, over a Ray of its own."""
    datalist = folder / "datalist.json"
    cases = prepare_phantom(folder / "volumes", sites=SITES, cases_per_site=None, shape=(36, 32, 20), seed=11)
    write_datalist(datalist, cases, description="soak")
    values = yaml.safe_load(Path("configs/phantom.yaml").read_text(encoding="utf-8"))
    values["data"]["datalist"] = str(datalist)
    values["federation"] = {"rounds": ROUNDS, "local_steps": local_steps, "evaluate_every": 2, "mode": mode}
    values["federation"] |= {"round_timeout_s": 30.0, "push_timeout_s": 15.0}
    values["resources"] = {"cpus_per_site": 0.5, "address": "local"}
    values["tracking"] = {"enabled": False}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def run(config: Path, folder: Path, chaos: str) -> subprocess.Popen[str]:
    """``gcml run`` in a process of its own, whose Ray keeps its files beside the run."""
    extra = ["--set", f"output.folder={folder}", *(["--chaos", chaos] if chaos else [])]
    return start(folder, [str(config), *extra])


def start(folder: Path, arguments: list[str]) -> subprocess.Popen[str]:
    """``gcml run`` with these arguments."""
    environment = os.environ | {"RAY_TMPDIR": str(tmpdir(folder)), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "gcml_ray", "run", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def tmpdir(folder: Path) -> Path:
    """A short path, because that of a socket lies in it, and one of this episode alone."""
    path = Path(tempfile.gettempdir()) / f"gcml_{os.getpid()}_{folder.name}"
    path.mkdir(exist_ok=True)
    return path


def episode(config: Path, folder: Path, rng: random.Random, undisturbed: dict[str, float]) -> Episode:
    """One run with faults drawn at random."""
    began = time.monotonic()
    kinds = tuple(rng.sample(KINDS, k=rng.choice((1, 1, 2))))
    sites = dict(zip(kinds, rng.sample(SITES, k=len(kinds)), strict=True))
    chaos = ",".join(fault(kind, site, rng) for kind, site in sites.items() if not kind.startswith("driver"))
    process = run(config, folder, chaos)
    lost = 0
    try:
        for kind in kinds:
            if kind.startswith("driver"):
                process, lost = kill_and_resume(process, folder, rng, corrupts=kind == "driver+corrupt")
        output, _ = process.communicate(timeout=EPISODE_LIMIT_S)
        hit = {site for kind, site in sites.items() if not kind.startswith("driver")}
        problem = check(folder, output, undisturbed, spared=set(SITES) - hit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        problem = f"hangs: no end within {EPISODE_LIMIT_S:.0f} s"
    return Episode(kinds, problem, time.monotonic() - began, lost)


def fault(kind: str, site: str, rng: random.Random) -> str:
    """One fault in the grammar of ``--chaos``."""
    number = rng.randint(2, ROUNDS - 3)
    return f"slow:{site}x3@r{number}" if kind == "slow" else f"{kind}:{site}@r{number}"


def kill_and_resume(
    process: subprocess.Popen[str], folder: Path, rng: random.Random, *, corrupts: bool
) -> tuple[subprocess.Popen[str], int]:
    """SIGKILL to the driver after some round, and a new driver on the same folder; how many rounds that lost."""
    target, until = rng.randint(1, ROUNDS - 2), time.monotonic() + EPISODE_LIMIT_S
    records = folder / "rounds.jsonl"
    while process.poll() is None and time.monotonic() < until:
        if records.exists() and len(records.read_text(encoding="utf-8").splitlines()) >= target:
            break
        time.sleep(0.1)
    time.sleep(rng.random())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for_no_process(folder)
    run_folder = RunFolder(folder)
    before = len(run_folder.rounds())
    lost = before - run_folder.read_state().last_complete_round
    if corrupts:  # the temporary file of a write that broke off, beside a site's last checkpoint
        checkpoints = run_folder.checkpoints(rng.choice(SITES))
        number = saved_rounds(checkpoints)[-1]
        (checkpoints / f"round_{number + 1:05d}.tmp").write_bytes(rng.randbytes(1000))
        (checkpoints / f"round_{number + 1:05d}.safetensors").write_bytes(rng.randbytes(1000))
    return start(folder, ["--resume", str(folder)]), lost


def wait_for_no_process(folder: Path, *, timeout_s: float = 60.0) -> bool:
    """Whether every process of an episode's cluster ends in time."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)  # noqa: S607
        if str(tmpdir(folder)) not in listing.stdout:
            return True
        time.sleep(0.5)
    return False


def check(folder: Path, output: str, undisturbed: dict[str, float], *, spared: set[str]) -> str:
    """What is wrong after an episode; empty where nothing is."""
    run_folder = RunFolder(folder)
    state = run_folder.read_state()
    if state.status != "finished":
        return f"ended as {state.status}: {' '.join(output.split()[-60:])}"
    numbers = [record.plan.round_number for record in run_folder.rounds()]
    if numbers != list(range(1, len(numbers) + 1)) or len(numbers) < ROUNDS:
        return f"rounds on disk: {numbers}"
    if not wait_for_no_process(folder):
        return "left processes of its cluster behind"
    found = dice_by_site(folder)
    worse = {site: found.get(site, 0.0) - undisturbed[site] for site in sorted(spared)}
    bad = {site: round(change, 3) for site, change in worse.items() if change < -TOLERANCE}
    mean_change = mean(list(worse.values()))
    return f"Dice of spared sites fell: {bad}" if mean_change < -TOLERANCE else ""


def dice_by_site(folder: Path) -> dict[str, float]:
    """Mean test Dice of each site's personalised model."""
    scores = [score for score in RunFolder(folder).cases() if score.model == PERSONALISED]
    return {
        site: round(mean([score.dice for score in scores if score.site == site]), 4)
        for site in sorted({score.site for score in scores})
    }


def table(episodes: list[Episode]) -> str:
    """Faults by kind: how many runs had them, how many of these survived, rounds lost to dead drivers."""
    had = Counter(kind for done in episodes for kind in done.kinds)
    survived = Counter(kind for done in episodes if not done.problem for kind in done.kinds)
    lost = max((done.lost_rounds for done in episodes), default=0)
    lines = ["| fault | episodes | survived |", "|---|---|---|"]
    lines += [f"| {kind} | {had[kind]} | {survived[kind]} |" for kind in KINDS if had[kind]]
    lines.append(f"\n{len(episodes)} episodes; finished rounds lost to a killed driver: at most {lost}")
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10, help="local steps of a round")
    parser.add_argument("--mode", choices=("sync", "async"), default="sync")
    return parser.parse_args()


if __name__ == "__main__":
    main()
