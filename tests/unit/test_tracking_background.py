import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gcml_ray.records import SiteInfo
from gcml_ray.tracking import background
from gcml_ray.tracking.background import BackgroundTracker
from gcml_ray.tracking.run import NullTracker


class SlowTracker(NullTracker):
    """Waits for ``go`` in every call and notes the order."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.seen: list[str] = []

    def log_sites(self, infos: list[SiteInfo]) -> None:
        del infos
        self.go.wait(60)
        self.seen.append("sites")

    def log_artifacts(self, paths: list[Path]) -> None:
        del paths
        raise OSError("disk full")

    def finish(self, status: str) -> None:
        self.seen.append(status)


def test_caller_does_not_wait_and_order_is_kept() -> None:
    slow = SlowTracker()
    tracker = BackgroundTracker(slow)
    tracker.log_sites([])
    assert slow.seen == []
    slow.go.set()
    tracker.finish("finished")
    assert slow.seen == ["sites", "finished"]


def test_a_failing_tracker_is_said_and_the_rest_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    slow = SlowTracker()
    slow.go.set()
    tracker = BackgroundTracker(slow)
    tracker.log_artifacts([])
    tracker.log_sites([])
    tracker.finish("stopped")
    assert slow.seen == ["sites", "stopped"]
    assert "tracking failed: OSError: disk full" in caplog.messages


def test_a_place_where_nothing_ever_arrived_is_not_waited_for_as_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """That nothing arrives may be known only a moment after the run's end."""
    monkeypatch.setattr(background, "SILENT_TIMEOUT_S", 0.2)
    monkeypatch.setattr(background, "QUIET_S", 0.1)
    slow = SlowTracker()
    tracker = BackgroundTracker(slow)
    tracker.log_sites([])
    threading.Timer(0.02, setattr, (slow, "is_unreachable", True)).start()
    tracker.finish("finished")
    assert caplog.messages == [
        "waiting for tracking (MLflow) to take what is left, at most 0.2 s",
        "tracking is not done after 0.2 s; the rest of it is given up",
    ]
    slow.go.set()


def test_what_was_given_up_does_not_keep_the_process_from_ending() -> None:
    """A server that does not answer for an hour; the process ends of itself, well within the test's own limit."""
    script = """
import time
from gcml_ray.tracking import background, run

class Stuck(run.NullTracker):
    def log_sites(self, infos):
        time.sleep(3600)

background.FINISH_TIMEOUT_S = 0.2
tracker = background.BackgroundTracker(Stuck())
tracker.log_sites([])
tracker.finish("finished")
print("over")
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)  # noqa: S603
    assert ended.stdout == "over\n"


def test_an_interrupt_ends_the_wait_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowTracker()
    tracker = BackgroundTracker(slow)
    tracker.log_sites([])

    def interrupted(timeout_s: float) -> None:
        raise KeyboardInterrupt(f"within {timeout_s} s")

    monkeypatch.setattr(tracker._thread, "join", interrupted)
    tracker.finish("finished")
    assert tracker._is_given_up
    slow.go.set()
