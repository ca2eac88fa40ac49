"""Finding a running cluster; joining real ones is tested in ``tests/cluster``."""

from __future__ import annotations

import pytest

from actors import cluster


def test_cluster_that_was_and_is_no_more_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray remembers the address of a head that has crashed, and by itself would try it for minutes."""

    def joins(*_: object) -> None:
        raise AssertionError("asked Ray to join")

    monkeypatch.setattr(cluster, "canonicalize_bootstrap_address", lambda _: "127.0.0.1:1")
    monkeypatch.setattr(cluster, "_init", joins)
    assert not cluster._join()
    assert "nothing answers at 127.0.0.1:1, the last known cluster" in caplog.text


def test_an_empty_address_in_the_environment_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setattr(cluster, "_join", lambda: False)
    with cluster.joined("auto") as where:
        assert where == ""


def test_without_a_cluster_there_is_none_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: str) -> str:
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(cluster, "canonicalize_bootstrap_address", none)
    assert not cluster._join()
