"""Freed memory stays with the process, turns are long. A process of its own a case: settings cannot be taken back."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from gcml_ray.training.cpu import SCHED_SETATTR, SLICE_NS, ask_for_long_turns, num_threads

FAULTS_OF_A_SECOND_BLOCK = """
import resource
from gcml_ray.training.cpu import keep_freed_memory
kept = keep_freed_memory() if {asked} else False
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(b"x") * (40 << 20)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    del block
print(int(kept), faults)
"""


def run(*, asked: bool, **environment: str) -> tuple[bool, int]:
    """Whether the setting was taken, and the page faults of 40 MiB that were freed just before."""
    plain = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    done = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-c", FAULTS_OF_A_SECOND_BLOCK.format(asked=asked)],
        env=plain | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    kept, faults = map(int, done.stdout.split())
    return bool(kept), faults


@pytest.mark.skipif(sys.platform != "linux", reason="a matter of glibc")
def test_memory_that_was_freed_is_used_again_without_a_page_fault() -> None:
    """40 MiB are 10,240 pages of 4 KiB; glibc gives blocks above 32 MiB back at once unless told otherwise."""
    _, before = run(asked=False)
    kept, after = run(asked=True)
    if not kept:
        pytest.skip("not glibc")
    assert before > 15 and after < before / 3  # noqa: PT018 - 20 huge pages at least


def test_settings_of_the_environment_go_first() -> None:
    kept, _ = run(asked=True, MALLOC_TRIM_THRESHOLD_="131072")
    assert not kept


SLICE_OF_THIS_THREAD = """
import ctypes, os, platform, struct, threading
from gcml_ray.training.cpu import SCHED_ATTR, ask_for_long_turns
GETATTR = {"x86_64": 315, "aarch64": 275}[platform.machine()]
def attributes():
    found = ctypes.create_string_buffer(64)
    assert ctypes.CDLL(None).syscall(GETATTR, 0, found, 64, 0) == 0
    _, policy, _, niceness, _, slice_ns, _, _ = struct.unpack(SCHED_ATTR, found.raw[:struct.calcsize(SCHED_ATTR)])
    return policy, niceness, slice_ns
os.nice(3)
before = attributes()
thread = threading.Thread(target=ask_for_long_turns)
thread.start()
thread.join()
assert attributes() == before, "another thread's turns have changed"
taken = ask_for_long_turns()
print(int(taken), *before, *attributes())
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() not in SCHED_SETATTR, reason="a system call of Linux")
def test_a_thread_has_longer_turns_and_its_own_niceness() -> None:
    done = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-c", SLICE_OF_THIS_THREAD], capture_output=True, text=True, check=True
    )
    taken, policy, niceness, before, policy_after, niceness_after, after = map(int, done.stdout.split())
    if not taken:
        pytest.skip("a sandbox forbids the call")
    assert (policy_after, niceness_after) == (policy, niceness)
    if policy != os.SCHED_OTHER or before == 0:
        pytest.skip("this Linux grants no turns of one's own, or none to this policy")
    assert after == SLICE_NS


@pytest.mark.parametrize(("cpus_per_site", "expected"), [(0.25, 1), (1.0, 1), (2.9, 2), (3.0, 3), (99.0, 3)])
def test_a_site_has_no_more_threads_than_there_are_cores(
    monkeypatch: pytest.MonkeyPatch, cpus_per_site: float, expected: int
) -> None:
    """More threads than cores wait for each other in every step; without Ray nobody else says no."""
    monkeypatch.setattr("gcml_ray.training.cpu.num_usable_cpus", lambda: 3)
    assert num_threads(cpus_per_site) == expected


def test_elsewhere_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert not ask_for_long_turns()
