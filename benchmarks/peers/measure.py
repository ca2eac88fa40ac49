"""One run of one contender as a process tree: how long it took, its peak memory, what went over the loopback."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
SHARE_OF_SAMPLING = 0.05  # of one core's time, at most
SHORTEST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 2.0
LINES_KEPT = 4
LETTERS_KEPT = 300


@dataclass(frozen=True)
class Measured:
    """One run. ``problem`` is empty where the process ended well in time."""

    seconds: float
    peak_memory_bytes: int
    loopback_bytes: int
    problem: str


def adopt_orphans() -> None:
    """Makes this process the parent of whatever its children leave behind, so that nothing escapes the sum."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def run(command: Sequence[str], *, environment: Mapping[str, str], folder: Path, limit_s: float) -> Measured:
    """Runs a command in a folder; its output goes to ``output.log`` there. Nothing of its tree is left after it.

    Args:
        command: program and arguments.
        environment: of the program.
        folder: where it runs.
        limit_s: after this it is ended, and the result says so.
    """
    known = set(descendants(os.getpid()))
    log = folder / "output.log"
    sent, peak, problem = loopback_bytes(), 0, ""
    with log.open("wb") as output:
        began = time.monotonic()
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        while True:
            sampling = time.monotonic()
            peak = max(peak, sum(map(pss_bytes, set(descendants(os.getpid())) - known)))
            now = time.monotonic()
            pause = min(LONGEST_PAUSE_S, max(SHORTEST_PAUSE_S, (now - sampling) / SHARE_OF_SAMPLING))
            if now - began > limit_s:
                problem = f"not finished after {limit_s:g} s"
                break
            try:
                process.wait(pause)
                break
            except subprocess.TimeoutExpired:
                continue
        seconds = time.monotonic() - began
    sent = loopback_bytes() - sent
    end(set(descendants(os.getpid())) - known)
    if not problem and process.wait(10) != 0:
        problem = f"exit status {process.returncode}: {last_lines(log)}"
    return Measured(seconds, peak, sent, problem)


def descendants(root: int) -> list[int]:
    """Process ids of all children, their children, and so on."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (parent := _parent(entry)) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    found, queue = [], [root]
    while queue:
        new = children.get(queue.pop(), [])
        found += new
        queue += new
    return found


def _parent(entry: Path) -> int | None:
    try:  # the name of a program may hold blanks and brackets: count from the last bracket
        return int((entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return None  # it has ended meanwhile


def pss_bytes(pid: int) -> int:
    """Proportional set size of a process: shared pages count once over all that share them. 0 if it is gone."""
    try:
        return parse_pss((Path("/proc") / str(pid) / "smaps_rollup").read_text(encoding="utf-8"))
    except OSError:
        return 0


def parse_pss(rollup: str) -> int:
    """Bytes on the ``Pss:`` line of ``smaps_rollup``; 0 where there is none."""
    for line in rollup.splitlines():
        if line.startswith("Pss:"):
            return 1024 * int(line.split()[1])
    return 0


def loopback_bytes() -> int:
    """Bytes received over the loopback device since the machine started."""
    return parse_loopback(Path("/proc/net/dev").read_text(encoding="utf-8"))


def parse_loopback(devices: str) -> int:
    """Bytes received by ``lo`` in ``/proc/net/dev``; 0 where there is none."""
    for line in devices.splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[0])
    return 0


def end(pids: Iterable[int]) -> None:
    """Ends processes: asks first, insists after five seconds."""
    left = set(pids)
    for sign in (signal.SIGTERM, signal.SIGKILL):
        for pid in left:
            try:
                os.kill(pid, sign)
            except ProcessLookupError:
                continue
        until = time.monotonic() + 5
        while left and time.monotonic() < until:
            left = {pid for pid in left if not _has_ended(pid)}
            time.sleep(0.05)


def _has_ended(pid: int) -> bool:
    """Whether a process is gone; collects it where it is our child."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return not (Path("/proc") / str(pid)).exists()


def last_lines(log: Path) -> str:
    """The end of a log, on one line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-LINES_KEPT:])[-LETTERS_KEPT:]
