"""Freed memory stays with the process. Each case in a process of its own: the setting cannot be taken back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FAULTS_OF_A_SECOND_BLOCK = """
import resource
from gcml_ray.allocator import keep_freed_memory
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
