"""What shows how far a command has come: a bar in a terminal, elsewhere a line after a while."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from gcml_ray.console import progress
from gcml_ray.console.progress import counted
from tests.waiting import Clock


def test_without_a_terminal_a_line_is_written_at_most_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    console = Console(file=io.StringIO())
    with counted(console, "reading") as tell:
        for done in range(1, 31):
            clock.sleep(1.0)
            tell(done, 30)
    assert console.file.getvalue().splitlines() == [f"reading: {done} of 30" for done in (10, 20, 30)]


def test_in_a_terminal_the_bar_is_gone_when_all_is_done() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with counted(console, "reading") as tell:
        tell(3, 7)
        assert "reading: 3" not in console.file.getvalue()
    shown = console.file.getvalue()
    assert "3/7" in shown
    assert shown.rstrip().endswith(("\x1b[2K", "\x1b[?25h"))
