"""What crosses a site's border, looked at message by message; shared by the tests over both pools.

Allowed are the records of ``gcml_ray/records.py``, headers of ``gcml_ray/push/wire.py``, plain values and names, each
message below 64 KiB; and, beside a header, one flat float32 array of the size of the model. Messages are noted
in a file, because a site's own process sends its pushes.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.local_pool import LocalPool, LocalTransport
from actors.site_pool import Outcome
from gcml_ray.config import Config
from gcml_ray.push.wire import Payload, PushHeader
from gcml_ray.records import PushReceipt

MAX_BYTES = 64 * 2**10
PLAIN = (bool, int, float, str, type(None))
RECORDS = ("gcml_ray.records", "gcml_ray.push.wire")


def strangers(value: Any, where: str = "message") -> Iterator[str]:
    """Every part of a message that is neither a record nor a plain value."""
    if isinstance(value, PLAIN):
        return
    if dataclasses.is_dataclass(value) and type(value).__module__ in RECORDS:
        for field in dataclasses.fields(value):
            yield from strangers(getattr(value, field.name), f"{where}.{field.name}")
    elif type(value) in (tuple, list, set, frozenset):
        for index, item in enumerate(value):
            yield from strangers(item, f"{where}[{index}]")
    elif type(value) is dict:
        for key, item in value.items():
            yield from strangers(key, f"{where} key")
            yield from strangers(item, f"{where}[{key!r}]")
    else:
        yield f"{where} is a {type(value).__module__}.{type(value).__qualname__}"


def problems_of(value: Any) -> list[str]:
    """What is wrong with a message that must be a small record."""
    found = list(strangers(value))
    size = 0 if found else len(pickle.dumps(value))
    return [*found, f"{size} bytes"] if size >= MAX_BYTES else found


def problems_of_push(buffer: Any, num_values: int) -> list[str]:
    """What is wrong with a buffer that must be the weights of a model of ``num_values``."""
    if type(buffer) is not np.ndarray:
        return [f"a buffer is a {type(buffer).__qualname__}"]
    is_right = buffer.dtype == np.float32 and buffer.shape == (num_values,)
    return [] if is_right else [f"a buffer is {buffer.dtype} {buffer.shape}, not float32 ({num_values},)"]


@dataclasses.dataclass(frozen=True)
class Book:
    """Notes messages in a file, one line each: what it was, and what is wrong with it."""

    path: Path
    num_values: int

    def note(self, what: str, problems: Sequence[str]) -> None:
        """One message."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([what, list(problems)]) + "\n")

    def note_push(self, header: PushHeader, buffer: Any, receivers: Sequence[str]) -> None:
        """A push on its way out."""
        wrong = problems_of((header, tuple(receivers))) + problems_of_push(buffer, self.num_values)
        self.note(f"push of {header.sender}", wrong)

    def note_call(self, method: str, arguments: Sequence[Any], transport: type) -> None:
        """A call into a site. The transport that it is given at the start only carries pushes."""
        self.note(f"call {method}", problems_of([value for value in arguments if not isinstance(value, transport)]))

    def note_outcome(self, outcome: Outcome) -> None:
        """A site's answer."""
        self.note(f"answer {outcome.method}", problems_of((outcome.site, outcome.result, outcome.failure)))

    def read(self) -> dict[str, list[list[str]]]:
        """The problems of all messages, by what they were."""
        messages: dict[str, list[list[str]]] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines():
            what, problems = json.loads(line)
            messages.setdefault(what, []).append(problems)
        return messages


def assert_only_weights_and_records(book: Book, *, senders: str) -> None:
    """Nothing is wrong with any message, and messages of all kinds were seen."""
    messages = book.read()
    wrong = {what: [each for each in problems if each] for what, problems in messages.items()}
    assert {what: problems for what, problems in wrong.items() if problems} == {}
    expected = {f"push of {sender}" for sender in senders}
    for method in ("start", "push", "train", "evaluate"):
        expected |= {f"call {method}", f"answer {method}"}
    assert messages.keys() >= expected


class NotesPushes:
    """Stands before a transport: notes every push in the sender's own process, and its receipts."""

    _book: Book

    def send(
        self, header: PushHeader, buffer: Payload, receivers: Sequence[str], *, timeout_s: float
    ) -> tuple[PushReceipt, ...]:
        """Notes and delivers."""
        self._book.note_push(header, buffer, receivers)
        receipts = super().send(header, buffer, receivers, timeout_s=timeout_s)  # type: ignore[misc]
        self._book.note("receipts", problems_of(receipts))
        return receipts


class NotesCalls:
    """Stands before a pool: notes every call and every answer. ``transport``: the only one that may be an argument."""

    _book: Book
    transport: type

    def submit(self, site: str, method: str, *arguments: Any, round_number: int) -> None:
        """Notes and submits."""
        self._book.note_call(method, arguments, self.transport)
        super().submit(site, method, *arguments, round_number=round_number)  # type: ignore[misc]

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Notes what came."""
        outcomes = super().wait(timeout_s)  # type: ignore[misc]
        for outcome in outcomes:
            self._book.note_outcome(outcome)
        return outcomes

    def statuses(self) -> list[Any]:
        """Notes what the sites say of themselves."""
        statuses = super().statuses()  # type: ignore[misc]
        self._book.note("statuses", problems_of(statuses))
        return statuses


class AuditedLocalTransport(NotesPushes, LocalTransport):
    """Notes what passes between sites of this process."""

    def __init__(self, sites: dict[str, Any], book: Book) -> None:
        super().__init__(sites)
        self._book = book


class AuditedLocalPool(NotesCalls, LocalPool):
    """Notes what passes between the driver and sites of this process."""

    transport = LocalTransport

    def __init__(self, config: Config, book: Book) -> None:
        super().__init__(config, config.output.folder, run_id="run")
        self._book = book
        self._transport = AuditedLocalTransport(self._sites, book)
