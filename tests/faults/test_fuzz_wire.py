"""Ten thousand malformed pushes to a site that trains nothing: never an exception, never a wrong acceptance.

``GCML_FUZZ_SEED`` repeats a run: the seed stands in the message of a failure.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.local_pool import LocalTransport
from actors.site import Site
from gcml_ray.config import SERVER
from gcml_ray.push.outbox import Outbox, Parcel
from gcml_ray.push.signing import SigningKey
from gcml_ray.push.wire import Buffer, PushHeader, TensorSpec, checksum
from gcml_ray.records import Peer
from tests.fakes import FakeTrainers, fake_config

SEED = int(os.environ.get("GCML_FUZZ_SEED", "20260101"))
NUM_VALUES = 40
NUM_PUSHES = 10_000
WIRES: list[dict[str, Any]] = [
    {},
    {"sign": True},
    {"encoding": "float16"},
    {"encoding": "bfloat16", "sign": True},
    {"encoding": "int8"},
    {"encoding": "topk", "topk_share": 0.2},
    {"encoding": "topk", "topk_share": 0.9, "sign": True},
]
Random = np.random.Generator


class Bench:
    """A receiver B, and all that an honest A has ever sent it."""

    def __init__(self, folder: Path, wire: dict[str, Any]) -> None:
        config = fake_config(folder, sites=("A", "B"), wire=wire, federation={"rounds": 100})
        self.is_signed = config.signs_pushes
        sites: dict[str, Site] = {}
        for name in ("A", "B"):
            make = FakeTrainers(num_values=NUM_VALUES)
            sites[name] = Site(config, name, str(folder), run_id="run", use_gpu=False, make_trainer=make)
        transport = LocalTransport(sites)
        infos = {name: site.start(transport, ("A", "B"), 0) for name, site in sites.items()}
        for site in sites.values():
            site.register(transport, {name: Peer(info.public_key, info.num_train) for name, info in infos.items()})
        self.a, self.b = sites["A"], sites["B"]
        self.stranger = Outbox(config.wire, key=SigningKey() if self.is_signed else None)
        self.round_number = 0

    def honest(self, random: Random) -> Parcel:
        """A's next push, which B has not seen yet."""
        self.round_number = self.round_number % 90 + 1
        self.b.mailbox.take()
        self.b.mailbox._last_round.clear()
        assert self.a.trainer is not None
        header, _ = self.a.trainer.export("run", self.round_number)
        vector: Buffer = random.normal(size=NUM_VALUES).astype(np.float32)
        (parcel,) = self.a.outbox.parcels(replace(header, checksum=checksum(vector)), vector, ("B",))
        return parcel


# --- ways to spoil a push --------------------------------------------------------------------------


def odd_value(random: Random) -> Any:
    """Anything that a field might hold instead."""
    values: list[Any] = [
        None, True, -1, 0, 10**30, 10**5000, -(2**63), 0.5, float("nan"), float("inf"), "", "A", "B", "C", SERVER,
        "x" * 5000, "\ud800", "\n", b"A", (), (1,), ("B", 3), [], {}, set(), object(), np.int64(3), np.float32(2),
        np.zeros(3), np.array(1), "float64", "topk", "int8", "float32", ((),), (TensorSpec("weights", (40,), "f", 0),),
        (TensorSpec(None, None, None, None),), (TensorSpec("weights", (None,), "float32", 0),), frozenset("A"),
    ]  # fmt: skip
    return values[random.integers(len(values))]


def spoil_header(parcel: Parcel, random: Random) -> tuple[Any, Any]:
    names = list(PushHeader.__dataclass_fields__)
    changes = {names[random.integers(len(names))]: odd_value(random) for _ in range(random.integers(1, 4))}
    return replace(parcel.header, **changes), parcel.payload


def no_header(parcel: Parcel, random: Random) -> tuple[Any, Any]:
    return odd_value(random), parcel.payload


def incomplete_header(parcel: Parcel, random: Random) -> tuple[Any, Any]:
    """As pickle could make it: a field is missing altogether."""
    header = object.__new__(PushHeader)
    names = list(PushHeader.__dataclass_fields__)
    missing = names[random.integers(len(names))]
    header.__dict__.update({name: value for name, value in parcel.header.__dict__.items() if name != missing})
    return header, parcel.payload


def flip_bits(parcel: Parcel, random: Random) -> tuple[Any, Any]:
    payload = parcel.payload.copy()
    payload.view(np.uint8)[random.integers(payload.nbytes)] ^= np.uint8(1 << random.integers(8))
    return parcel.header, payload


def change_size(parcel: Parcel, random: Random) -> tuple[Any, Any]:
    payload = parcel.payload
    size = int(random.integers(0, 2 * payload.size))
    return parcel.header, np.resize(payload, size) if size != payload.size else payload[:-1]


def odd_buffer(parcel: Parcel, random: Random) -> tuple[Any, Any]:
    payload = parcel.payload
    buffers: list[Any] = [
        payload.reshape(1, -1), payload.astype(np.float64), payload.astype(object), payload.tobytes(),
        payload.astype(">f4"), payload.tolist(), np.broadcast_to(np.float32(1), (2**40,)), np.empty(0, np.float32),
        np.empty(0, np.uint8), np.array(payload[0]), np.array(["a", "b"]), memoryview(payload),
        np.zeros(NUM_VALUES, dtype=[("a", "f4")]), odd_value(random),
    ]  # fmt: skip
    return parcel.header, buffers[random.integers(len(buffers))]


SPOILERS: list[Callable[[Parcel, Random], tuple[Any, Any]]] = [
    spoil_header, no_header, incomplete_header, flip_bits, change_size, odd_buffer,
]  # fmt: skip


def describes_another_push(header: Any, payload: Any, honest: Parcel) -> bool:
    """Whether what was sent differs from the honest push in more than what nobody checks without signatures."""
    unchecked = {"exported_at", "round_number", "receivers", "digest", "signature", "base"}
    same_payload = isinstance(payload, np.ndarray) and payload.tobytes() == honest.payload.tobytes()
    same_fields = isinstance(header, PushHeader) and all(
        getattr(header, name, None) == getattr(honest.header, name)
        for name in PushHeader.__dataclass_fields__
        if name not in unchecked
    )
    return not (same_payload and same_fields)


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_malformed_pushes_are_refused_with_a_receipt(tmp_path: Path, wire: dict[str, Any]) -> None:
    random, bench = np.random.default_rng(SEED), Bench(tmp_path, wire)
    honest, accepted = bench.honest(random), 0
    for index in range(NUM_PUSHES // len(WIRES) + 1):
        spoiler = SPOILERS[random.integers(len(SPOILERS))]
        header, payload = spoiler(honest, random)
        receipt = bench.b.receive(header, payload)
        note = f"seed {SEED}, push {index}, {spoiler.__name__}: {receipt}"
        assert bool(receipt.reason) != receipt.accepted, note
        (receipt.reason + receipt.sender).encode()  # it goes to a log and to JSON
        if receipt.accepted:
            accepted += 1
            assert not describes_another_push(header, payload, honest), note
            if bench.is_signed:
                assert header == honest.header, note
        if receipt.accepted or index % 20 == 19:
            bench.a.outbox.acknowledge([receipt])
            honest = bench.honest(random)
            bench.a.outbox.acknowledge([bench.b.receive(honest.header, honest.payload)])
            assert len(bench.b.mailbox.take()) == 1, f"seed {SEED}, push {index}: an honest push was refused"
            honest = bench.honest(random)
    assert accepted < NUM_PUSHES / len(WIRES) / 4


@pytest.mark.parametrize("wire", [wire for wire in WIRES if wire.get("sign")], ids=str)
def test_well_formed_pushes_of_a_stranger_are_refused(tmp_path: Path, wire: dict[str, Any]) -> None:
    """Everything is right but the key: a site of the run, its round, its architecture, a fitting payload."""
    random, bench = np.random.default_rng(SEED), Bench(tmp_path, wire)
    for _ in range(100):
        honest = bench.honest(random)
        header = bench.stranger._key.sign(honest.header, honest.payload)  # type: ignore[union-attr]
        assert bench.b.receive(header, honest.payload).reason == "signature: not made by the key of A"


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_push_that_was_taken_is_refused_when_it_comes_again(tmp_path: Path, wire: dict[str, Any]) -> None:
    """Also after the receiver has used it."""
    random, bench = np.random.default_rng(SEED), Bench(tmp_path, wire)
    honest = bench.honest(random)
    assert bench.b.receive(honest.header, honest.payload).accepted
    assert not bench.b.receive(honest.header, honest.payload).accepted
    bench.b.mailbox.take()
    assert not bench.b.receive(honest.header, honest.payload).accepted
    older = replace(honest.header, round_number=0)
    assert not bench.b.receive(older, honest.payload).accepted
