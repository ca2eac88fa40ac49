"""One real Ray for the tests of this folder; every test must leave it without actors and placement groups."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.state import actors as all_actors
from ray.util.placement_group import placement_group_table

from actors import sync_rounds
from actors.pace import CallKind
from actors.roster import Roster
from tests.waiting import wait_until

CPUS, GPUS = 8, 2  # both logical
STORE_BYTES = 400 * 2**20


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder need a cluster."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)


def live_actors() -> set[str]:
    """Names of the actors that are not dead."""
    return {str(actor["Name"]) for actor in all_actors().values() if actor["State"] != "DEAD"}


def placement_groups() -> int:
    """How many placement groups are not removed."""
    return sum(group["state"] != "REMOVED" for group in placement_group_table().values())


@pytest.fixture(scope="session")
def _ends_with_the_session() -> Iterator[None]:
    yield
    ray.shutdown()


@pytest.fixture
def ray_local(_ends_with_the_session: None) -> Iterator[None]:
    """A connection to a local cluster of 8 CPUs and 2 logical GPUs, kept from test to test."""
    if not ray.is_initialized():
        ray.init(
            "local",
            num_cpus=CPUS,
            num_gpus=GPUS,
            object_store_memory=STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            namespace="gcml",
        )
    yield
    gc.collect()
    assert wait_until(lambda: not live_actors()), f"left alive: {live_actors()}"
    assert wait_until(lambda: placement_groups() == 0), "a placement group is left"


@pytest.fixture
def waits_for_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round of fakes is over in milliseconds, a restart takes seconds: here a round's start is put off for it."""
    monkeypatch.setattr(sync_rounds, "RETURN_PATIENCE", 1e4)


@pytest.fixture
def give_up_soon(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, int], None]:
    """Makes the driver give up a site's call in a round after a second; healthy calls keep all the time they need."""

    def give_up(name: str, stage: str, round_number: int) -> None:
        note = Roster._open

        def note_with_limit(self: Roster, *call: Any, kind: CallKind | None = None) -> None:
            *which, timeout_s = call
            note(self, *which, 1.0 if which == [name, stage, round_number] else timeout_s, kind=kind)

        monkeypatch.setattr(Roster, "_open", note_with_limit)

    return give_up
