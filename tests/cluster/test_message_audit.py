"""The audit of ``tests/unit/test_message_audit.py`` over real actors: what their processes send and answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray import ObjectRef

from actors.object_store import ObjectStoreTransport
from actors.ray_pool import RayPool
from gcml_ray.config import Config
from gcml_ray.networks.registry import build_network
from tests.makers import make_config
from tests.message_audit import Book, NotesCalls, NotesPushes, assert_only_weights_and_records
from tests.runs import drive

pytestmark = pytest.mark.usefixtures("ray_local")


class AuditedTransport(NotesPushes, ObjectStoreTransport):
    """Notes what an actor sends to others."""

    def __init__(self, handles: Any, *, label_key: str | None, book: Book) -> None:
        super().__init__(handles, label_key=label_key)
        self._book = book


class AuditedRayPool(NotesCalls, RayPool):
    """Notes what passes between the driver and the actors."""

    transport = ObjectStoreTransport

    def __init__(self, config: Config, book: Book) -> None:
        def make_transport(handles: Any, *, label_key: str | None) -> AuditedTransport:
            return AuditedTransport(handles, label_key=label_key, book=book)

        super().__init__(config, config.output.folder, run_id="run", make_transport=make_transport)
        self._book = book

    def submit(self, site: str, method: str, *arguments: Any, round_number: int) -> None:
        """Notes and submits."""
        assert not any(isinstance(value, ObjectRef) for value in arguments), "the driver holds no weights"
        super().submit(site, method, *arguments, round_number=round_number)


def test_only_weights_and_small_records_cross_an_actors_border(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    network = build_network(config.network, config.data)
    book = Book(tmp_path / "messages.jsonl", sum(parameter.numel() for parameter in network.parameters()))
    run = drive(config, AuditedRayPool(config, book))
    assert run.summary.status == "finished"
    assert_only_weights_and_records(book, senders="AB")
    assert "statuses" in book.read()
