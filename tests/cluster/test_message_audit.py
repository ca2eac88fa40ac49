"""The audit of ``tests/unit/test_message_audit.py`` over real actors: what their processes send and answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from ray import ObjectRef

from actors.local_pool import Outcome
from actors.pool import ObjectStoreTransport, RayPool
from gcml_ray.config import Config
from gcml_ray.networks.registry import build_network
from gcml_ray.records import PushReceipt
from gcml_ray.wire import Payload, PushHeader
from tests.fake_runs import drive
from tests.makers import make_config
from tests.message_audit import Book, assert_only_weights_and_records, problems_of

pytestmark = pytest.mark.usefixtures("ray_local")


class AuditedTransport(ObjectStoreTransport):
    """Notes every push in the sender's own process, and its receipts."""

    def __init__(self, handles: Any, *, label_key: str | None, book: Book) -> None:
        super().__init__(handles, label_key=label_key)
        self._book = book

    def send(
        self, header: PushHeader, buffer: Payload, receivers: Sequence[str], *, timeout_s: float
    ) -> tuple[PushReceipt, ...]:
        """Notes and sends."""
        self._book.note_push(header, buffer, receivers)
        receipts = super().send(header, buffer, receivers, timeout_s=timeout_s)
        self._book.note("receipts", problems_of(receipts))
        return receipts


class AuditedRayPool(RayPool):
    """Notes every call and every answer."""

    def __init__(self, config: Config, book: Book) -> None:
        def make_transport(handles: Any, *, label_key: str | None) -> AuditedTransport:
            return AuditedTransport(handles, label_key=label_key, book=book)

        super().__init__(config, config.output.folder, run_id="run", make_transport=make_transport)
        self._book = book

    def submit(self, site: str, method: str, *arguments: Any, round_number: int) -> None:
        """Notes and submits."""
        assert not any(isinstance(value, ObjectRef) for value in arguments), "the driver holds no weights"
        self._book.note_call(method, arguments, ObjectStoreTransport)
        super().submit(site, method, *arguments, round_number=round_number)

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Notes what came."""
        outcomes = super().wait(timeout_s)
        for outcome in outcomes:
            self._book.note_outcome(outcome)
        return outcomes

    def statuses(self) -> list[Any]:
        """Notes what the sites say of themselves."""
        statuses = super().statuses()
        self._book.note("statuses", problems_of(statuses))
        return statuses


def test_only_weights_and_small_records_cross_an_actors_border(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    network = build_network(config.network, config.data)
    book = Book(tmp_path / "messages.jsonl", sum(parameter.numel() for parameter in network.parameters()))
    run = drive(config, AuditedRayPool(config, book))
    assert run.summary.status == "finished"
    assert_only_weights_and_records(book, senders="AB")
    assert "statuses" in book.read()
