"""What the soak does to a run: which fault at which site and when, and how each is carried out.

Those of ``--chaos`` happen inside a site's own code; the others come from outside, at a random moment.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from benchmarks import small_runs
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.model.checkpoint import saved_rounds
from gcml_ray.push.wire import PushHeader

if TYPE_CHECKING:
    from benchmarks.chaos_cluster import Cluster

BY_CHAOS = ("kill", "hang", "raise", "nan", "oom", "disk", "slow")
OUTSIDE = {
    "process": "SIGKILL to a site's process",
    "stall": "SIGSTOP to a site, SIGCONT after some seconds",
    "freeze": "SIGSTOP to a site, for good",
    "actors": "SIGKILL to all sites at once",
    "raylet": "SIGKILL to a node, back after some seconds",
    "driver": "SIGKILL to the driver, resumed",
    "corrupt": "SIGKILL to the driver, a checkpoint spoilt, resumed",
    "cluster": "SIGKILL to driver and cluster, resumed on a new one",
    "full_disk": "no space in the run folder for some seconds",
    "malformed": "pushes that make no sense",
}
AT_A_SITE = (*BY_CHAOS, "process", "stall", "freeze", "malformed")
WIDE = ("actors", "raylet")  # no saying beforehand who is hit
FIRST_FAULT, QUIET_END = 2, 4  # the earliest round of a fault, and how many rounds after the last one
LEAST_ROUNDS = FIRST_FAULT + QUIET_END
TMPFS_BYTES = 48 * 2**20
PUSH_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Fault:
    """One fault: once so many rounds are on disk, after a random while; ``site`` is empty where it has none."""

    kind: str
    site: str
    round_number: int
    delay_s: float

    @property
    def chaos(self) -> str:
        """In the grammar of ``--chaos``; empty for those from outside."""
        if self.kind not in BY_CHAOS:
            return ""
        factor = "x3" if self.kind == "slow" else ""
        return f"{self.kind}:{self.site}{factor}@r{self.round_number}"

    def __str__(self) -> str:
        at = f" {self.site}" if self.site else ""
        return f"{self.kind}{at}@r{self.round_number}"


def draw_faults(seed: int, number: int, *, kinds: tuple[str, ...], rounds: int) -> tuple[Fault, ...]:
    """The faults of an episode, two or the last one of a pack: a function of its number alone.

    Kinds come as cards from a shuffled pack, so that each turns up once before any does twice.
    """
    per_pack = (len(kinds) + 1) // 2
    pack = random.Random(f"{seed} pack {number // per_pack}").sample(kinds, k=len(kinds))
    hand = pack[2 * (number % per_pack) :][:2]
    rng = random.Random(f"{seed} episode {number}")
    sites = rng.sample(small_runs.SITES, k=2)
    last = rounds - QUIET_END
    return tuple(
        Fault(kind, site if kind in AT_A_SITE else "", rng.randint(FIRST_FAULT, last), rng.uniform(0.0, 1.5))
        for kind, site in zip(hand, sites, strict=False)
    )


@dataclass
class Scene:
    """A run in progress, as those see it who disturb it.

    Attributes:
        process: ``gcml run``; a new one after a resume.
        seen: processes that were sites.
        later: what has to be put right again, and when.
        lost: rounds that a killed driver had on disk and that were to be done again.
        problems: what has gone wrong already.
        heard: how much of the console belongs to drivers before this one, in bytes.
    """

    cluster: Cluster
    folder: Path
    process: subprocess.Popen[str]
    rng: random.Random
    seen: set[int] = field(default_factory=set)
    later: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    lost: int = 0
    problems: list[str] = field(default_factory=list)
    heard: int = 0

    def put_right(self, *, all_of_it: bool = False) -> None:
        """Ends what was to last a while only."""
        due = [entry for entry in self.later if all_of_it or time.monotonic() >= entry[0]]
        self.later = [entry for entry in self.later if entry not in due]
        for _, undo in due:
            undo()

    def strike(self, fault: Fault) -> bool:
        """Carries out a fault from outside; False where its site is not there just now."""
        match fault.kind:
            case "process":
                return self._signal(fault.site, signal.SIGKILL)
            case "freeze":
                return self._signal(fault.site, signal.SIGSTOP)
            case "stall":
                return self._stall(fault.site)
            case "actors":
                hit = [self._signal(site, signal.SIGKILL) for site in self.cluster.sites()]
                return any(hit)
            case "raylet":
                self.cluster.lose_node()
                self._in(self.rng.uniform(2, 8), self.cluster.add_node)
            case "full_disk":
                self._in(self.rng.uniform(2, 6), fill(self.folder))
            case "malformed":
                return self._send_nonsense(fault.site)
            case _:
                self._kill_driver(fault.kind)
        return True

    def _in(self, seconds: float, undo: Callable[[], None]) -> None:
        self.later.append((time.monotonic() + seconds, undo))

    def _signal(self, site: str, number: signal.Signals) -> bool:
        """A signal to a site's process."""
        pid = self.cluster.sites().get(site)
        if pid is None:
            return False
        self.seen.add(pid)
        return _kill(pid, number)

    def _stall(self, site: str) -> bool:
        """Nothing moves at a site for some seconds."""
        pid = self.cluster.sites().get(site)
        if pid is None or not _kill(pid, signal.SIGSTOP):
            return False
        self._in(self.rng.uniform(2, 12), lambda: _continue(pid))
        return True

    # --- driver and cluster ------------------------------------------------------------------

    def _kill_driver(self, kind: str) -> None:
        """SIGKILL, then the same folder again; with ``corrupt`` and ``cluster`` worse than that."""
        if self.process.poll() is not None:
            return
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        folder = RunFolder(self.folder)
        self.lost = max(self.lost, len(folder.rounds()) - folder.read_state().last_complete_round)
        if kind == "cluster":
            self.cluster.kill_all()
            self.cluster.start()
        if kind == "corrupt":
            spoil_checkpoint(folder, self.rng)
        self.resume()

    def resume(self) -> None:
        """A new driver on the folder."""
        self.heard = small_runs.console_file(self.folder).stat().st_size
        self.process = small_runs.resume(self.folder, environment=self.cluster.environment)

    # --- pushes ------------------------------------------------------------------------------

    def _send_nonsense(self, site: str) -> bool:
        """Sends a site what no site would; each must be refused, and the site must stay."""
        try:
            actor, run_id = self.cluster.actor_of(site)
            receive = actor.receive.options(concurrency_group="inbox")
            receipts = ray.get([receive.remote(*push) for push in nonsense(run_id, self.rng)], timeout=PUSH_TIMEOUT_S)
        except (ValueError, ray.exceptions.RayActorError):
            return False
        except ray.exceptions.GetTimeoutError:
            self.problems.append(f"{site} did not answer pushes within {PUSH_TIMEOUT_S:.0f} s")
            return True
        except ray.exceptions.RayTaskError as error:
            self.problems.append(f"{site} raised at a push: {error.cause!r}")
            return True
        if taken := [receipt for receipt in receipts if receipt.accepted]:
            self.problems.append(f"{site} accepted {taken[0]}")
        return True


def nonsense(run_id: str, rng: random.Random) -> list[tuple[Any, Any]]:
    """Headers and buffers that are wrong in their types, their sizes, their names or their numbers."""
    draw = np.random.default_rng(rng.getrandbits(32))
    numbers = draw.standard_normal(1000).astype(np.float32)
    header = PushHeader(run_id, 3, "east", 5, "f", "c", (), 1000, "float32", "0")
    stranger = PushHeader(run_id, 3, "nobody", 5, "f", "c", (), 1000, "float32", "0")
    return [
        (None, None),
        ("header", draw.bytes(100)),
        (header, None),
        (header, numbers),
        (header, np.full(1000, np.nan, np.float32)),
        (header, np.array([object()], dtype=object)),
        (header, draw.standard_normal((10, 10))),
        (stranger, numbers),
        (PushHeader(run_id, -1, "", -5, "", "", (), 2**62, "float64", ""), numbers),
        (PushHeader("", "3", 7, None, "f", "c", "layout", 1.5, 5, None), numbers),  # type: ignore[arg-type]
    ]


def spoil_checkpoint(folder: RunFolder, rng: random.Random) -> str:
    """Cuts a site's newest checkpoint short, or flips a bit of it; returns what was done."""
    for site in rng.sample(small_runs.SITES, k=len(small_runs.SITES)):
        checkpoints = folder.checkpoints(site)
        rounds = saved_rounds(checkpoints)
        if len(rounds) < 2:
            continue
        path = checkpoints / f"round_{rounds[-1]:05d}.safetensors"
        content = bytearray(path.read_bytes())
        if rng.random() < 0.5:
            path.write_bytes(content[: rng.randrange(len(content))])
            return f"{site}: {path.name} cut short"
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        return f"{site}: a bit of {path.name} flipped"
    return ""


def _kill(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _continue(pid: int) -> None:
    _kill(pid, signal.SIGCONT)


# --- disks ---------------------------------------------------------------------------------------


def mount_small(folder: Path) -> bool:
    """A small tmpfs at a folder; False where we may not mount."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def unmount(folder: Path) -> None:
    """Takes a tmpfs away with all that is in it."""
    subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)  # noqa: S607


def fill(folder: Path) -> Callable[[], None]:
    """Fills the disk of a folder to its last byte; what is returned frees it again.

    Raises:
        ValueError: it is no small disk of its own.
    """
    disk = os.statvfs(folder)
    if not os.path.ismount(folder) or disk.f_blocks * disk.f_frsize > TMPFS_BYTES:
        raise ValueError(f"{folder} is not a tmpfs of {TMPFS_BYTES} bytes: it is not filled")
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            try:
                while file.write(b"\0" * size):
                    pass
            except OSError:
                continue
    return lambda: ballast.unlink(missing_ok=True)
