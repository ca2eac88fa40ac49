"""A soak: federations over Ray with faults at random times; each run must end whole, as if undisturbed.

An episode is one run of a small phantom federation on a cluster of two raylets, with two faults: those of
``--chaos`` (kill, hang, raise, NaN, out of memory, full disk, slow), and from outside SIGKILL to a site's process, to
all of them, to a raylet, to the driver, to everything; SIGSTOP; a full disk under the run folder; a spoilt checkpoint
before a resume; malformed pushes. After it: the run has finished, every round is on disk, no site was given up,
nothing is left behind (actors, processes, objects, placement groups, temporary files, shared memory), and the sites
that were spared are on average within a point of test Dice of the undisturbed run of the same seed.

Episodes go to ``benchmarks/results/chaos_MODE_SEED.csv`` as they end. Ctrl-C stops; ``--resume`` goes on with
that file. ``--write-docs`` puts the table into ``docs/reliability.md``.

    python -m benchmarks.chaos --minutes 10 --seed 0 --mode sync --write-docs
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import chaos_table, small_runs
from benchmarks.chaos_cluster import Cluster
from benchmarks.chaos_faults import (
    BY_CHAOS,
    LEAST_ROUNDS,
    OUTSIDE,
    WIDE,
    Fault,
    Scene,
    draw_faults,
    mount_small,
    unmount,
)
from benchmarks.chaos_table import FELL, Episode
from gcml_ray.config import Config
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.prediction.averages import mean

TOLERANCE = 0.01  # of Dice
CLOCKS = {"round_timeout_s": 20.0, "push_timeout_s": 10.0, "start_timeout_s": 240.0, "rejoin_timeout_s": 240.0}


@dataclass(frozen=True)
class Soak:
    """What all episodes share."""

    cluster: Cluster
    folder: Path
    datalist: Path
    options: argparse.Namespace
    kinds: tuple[str, ...]

    def config(self, folder: Path) -> Config:
        """The federation that is disturbed."""
        options = self.options
        return small_runs.make_config(
            self.datalist,
            folder,
            rounds=options.rounds,
            local_steps=options.steps,
            federation={"mode": options.mode, "seed": options.seed, **CLOCKS},
        )


def main() -> None:
    """Runs episodes for as long as asked for and says what came of them."""
    options = _options()
    file = chaos_table.csv_file(options.mode, options.seed)
    if not options.resume:
        file.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="soak") as name:
        folder = Path(name)
        kinds = _kinds(folder, options.only)
        with contextlib.suppress(KeyboardInterrupt):
            cluster = Cluster()
            try:
                datalist = small_runs.make_data(folder, seed=options.seed)
                _soak(Soak(cluster, folder, datalist, options, kinds), file)
            finally:
                cluster.shutdown()
    _conclude(options, file)


def _kinds(folder: Path, only: Sequence[str]) -> tuple[str, ...]:
    """The faults to draw from; a full disk needs a disk that we may mount."""
    kinds = tuple(only) or (*BY_CHAOS, *OUTSIDE)
    if mount_small(folder / "try"):
        unmount(folder / "try")
        return kinds
    print("no tmpfs can be mounted here: the full disk under the run folder is left out")
    return tuple(kind for kind in kinds if kind != "full_disk")


def _soak(soak: Soak, file: Path) -> None:
    """Episode after episode."""
    calm = soak.folder / "calm"
    process = small_runs.start(soak.config(calm), environment=soak.cluster.environment)
    try:
        small_runs.finish(process, limit_s=soak.options.limit_s)
    finally:
        small_runs.end(process)
    undisturbed = small_runs.dice_by_site(calm)
    if not undisturbed:
        sys.exit(f"the undisturbed run failed: {small_runs.last_words(calm)}")
    print("undisturbed:", {site: round(dice, 3) for site, dice in undisturbed.items()}, flush=True)
    done = chaos_table.read(file)
    number, spent = len(done), sum(one.seconds for one in done)
    while spent < 60 * soak.options.minutes:
        episode = run_episode(soak, number, undisturbed)
        chaos_table.append(file, episode)
        state = episode.problem or "survived"
        print(f"{number}. {episode.faults}: {state} ({episode.seconds:.0f} s)", flush=True)
        number, spent = number + 1, spent + episode.seconds


def _conclude(options: argparse.Namespace, file: Path) -> None:
    """Table, docs, exit code."""
    episodes = chaos_table.read(file)
    text = chaos_table.table(episodes)
    print(text)
    if options.write_docs:
        command = (
            f"`python -m benchmarks.chaos --minutes {options.minutes:g} --seed {options.seed} --mode {options.mode}`"
        )
        chaos_table.write_into_page(chaos_table.PAGE, f"chaos {options.mode}", f"{command}\n\n{text}")
    sys.exit(any(one.problem for one in episodes))


def run_episode(soak: Soak, number: int, undisturbed: dict[str, float]) -> Episode:
    """One run with its faults, and what must hold after it."""
    began = time.monotonic()
    faults = draw_faults(soak.options.seed, number, kinds=soak.kinds, rounds=soak.options.rounds)
    folder = soak.folder / f"run{number}"
    has_disk = any(fault.kind == "full_disk" for fault in faults) and mount_small(folder)
    faults = tuple(fault for fault in faults if has_disk or fault.kind != "full_disk")
    chaos = ",".join(fault.chaos for fault in faults if fault.chaos)
    process = small_runs.start(soak.config(folder), chaos=chaos, environment=soak.cluster.environment)
    scene = Scene(soak.cluster, folder, process, random.Random(f"{soak.options.seed} scene {number}"))
    try:
        struck = _play(scene, faults, limit_s=soak.options.limit_s)
        small_runs.end(scene.process)
        problem = "; ".join([*scene.problems, *_problems(soak, scene)])
        dice = _dice_change(folder, struck, undisturbed)
        if not problem and dice < -TOLERANCE:
            problem = f"{FELL} {-100 * dice:.1f} points"
        return Episode(
            number,
            " + ".join(str(fault) for fault in struck) or "none",
            problem,
            scene.lost,
            _rounds_missed(folder),
            dice,
            time.monotonic() - began,
        )
    finally:
        scene.put_right(all_of_it=True)
        small_runs.end(scene.process)
        if soak.options.keep and folder.exists():
            kept = soak.options.keep / f"{soak.options.mode}{number}"
            shutil.copytree(folder, kept, dirs_exist_ok=True)
            shutil.copy(small_runs.console_file(folder), kept)
        if has_disk:
            unmount(folder)


def _play(scene: Scene, faults: Sequence[Fault], *, limit_s: float) -> list[Fault]:
    """Lets a run go on until it ends, and disturbs it; returns the faults that happened."""
    waiting = {fault: math.inf for fault in faults if not fault.chaos}
    struck = [fault for fault in faults if fault.chaos]
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        if scene.process.poll() is not None and not _goes_on(scene):
            return struck
        scene.put_right()
        now, rounds = time.monotonic(), small_runs.num_rounds(scene.folder)
        for fault, due in list(waiting.items()):
            if rounds >= fault.round_number and due == math.inf:
                waiting[fault] = now + fault.delay_s
            elif now >= due and scene.strike(fault):
                struck.append(fault)
                del waiting[fault]
        scene.seen |= set(scene.cluster.sites().values())
        time.sleep(0.1)
    scene.problems.append(f"no end within {limit_s:.0f} s")
    return struck


def _goes_on(scene: Scene) -> bool:
    """Whether a driver that has ended is started again: where its disk was full, and it says so."""
    words = small_runs.last_words(scene.folder, num_words=200, since=scene.heard)
    if scene.process.returncode == 0 or "No space left" not in words:
        return False
    if "Traceback" in words:
        scene.problems.append(f"a full disk ends the driver with a traceback: {words[-300:]}")
    scene.put_right(all_of_it=True)
    scene.resume()
    return True


# --- what must hold ------------------------------------------------------------------------------


def _problems(soak: Soak, scene: Scene) -> list[str]:
    """What is wrong with a run that has ended."""
    folder = RunFolder(scene.folder)
    if not folder.state_file.exists():
        return [f"no state on disk: {small_runs.last_words(scene.folder)}"]
    state = folder.read_state()
    problems = []
    if state.status != "finished":
        problems.append(f"ended as {state.status}: {small_runs.last_words(scene.folder)}")
    if state.dropped:
        problems.append(f"given up: {state.dropped}")
    numbers = [record.plan.round_number for record in folder.rounds()]
    if numbers != list(range(1, len(numbers) + 1)) or (
        soak.options.mode == "sync" and len(numbers) < soak.options.rounds
    ):
        problems.append(f"rounds on disk: {numbers}")
    done = [(report.site, report.round_number) for record in folder.rounds() for report in record.trained]
    if twice := sorted({one for one in done if done.count(one) > 1}):
        problems.append(f"rounds twice on disk: {twice}")
    if state.status == "finished" and (missing := set(small_runs.SITES) - set(small_runs.dice_by_site(scene.folder))):
        problems.append(f"not tested: {sorted(missing)}")
    if left := sorted(path.name for name in ("*.tmp", ".tmp*") for path in scene.folder.rglob(name)):
        problems.append(f"temporary files left: {left}")
    if leaks := soak.cluster.leaks(scene.seen):
        problems.append(leaks)
    return problems


def _dice_change(folder: Path, faults: Sequence[Fault], undisturbed: dict[str, float]) -> float:
    """Mean change over the sites that were spared; NaN where none was, or none was tested."""
    if any(fault.kind in WIDE for fault in faults):
        return math.nan
    found = small_runs.dice_by_site(folder)
    spared = set(found) & set(undisturbed) - {fault.site for fault in faults}
    return mean([found[site] - undisturbed[site] for site in sorted(spared)]) if spared else math.nan


def _rounds_missed(folder: Path) -> int:
    """Rounds of single sites that nobody trained: of those between a site's first and the run's last."""
    trained = {(report.site, report.round_number) for one in RunFolder(folder).rounds() for report in one.trained}
    last = max((number for _, number in trained), default=0)
    return last * len(small_runs.SITES) - len(trained)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=("sync", "async"), default="sync")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of a run")
    parser.add_argument("--steps", type=int, default=8, help="local steps of a round")
    parser.add_argument("--limit-s", type=float, default=300.0, help="a run that takes longer hangs")
    parser.add_argument("--only", nargs="*", default=[], choices=(*BY_CHAOS, *OUTSIDE), help="draw from these alone")
    parser.add_argument("--resume", action="store_true", help="go on with the episodes on disk")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/reliability.md")
    parser.add_argument("--keep", type=Path, default=None, help="copy every run to this folder, to look into it")
    options = parser.parse_args()
    if options.rounds < LEAST_ROUNDS:
        parser.error(
            f"--rounds {options.rounds}: {LEAST_ROUNDS} or more, as no fault comes in the first or last rounds"
        )
    return options


if __name__ == "__main__":
    main()
