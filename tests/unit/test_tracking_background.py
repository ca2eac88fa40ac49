import threading
import time
from pathlib import Path

import pytest

from gcml_ray.records import SiteInfo
from gcml_ray.tracking.background import BackgroundTracker
from gcml_ray.tracking.run import NullTracker


class SlowTracker(NullTracker):
    """Waits for ``go`` in every call and notes the order."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.seen: list[str] = []

    def log_sites(self, infos: list[SiteInfo]) -> None:
        del infos
        self.go.wait(10)
        self.seen.append("sites")

    def log_artifacts(self, paths: list[Path]) -> None:
        del paths
        raise OSError("disk full")

    def finish(self, status: str) -> None:
        self.seen.append(status)


def test_caller_does_not_wait_and_order_is_kept() -> None:
    slow = SlowTracker()
    tracker = BackgroundTracker(slow)
    began = time.monotonic()
    tracker.log_sites([])
    assert time.monotonic() - began < 1
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
    assert "tracking failed: OSError('disk full')" in caplog.messages
