"""Who may speak for a site: every case plays sender and receiver with real keys."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcml_ray.config.wire import WireConfig
from gcml_ray.push.inbox import Inbox
from gcml_ray.push.outbox import Outbox
from gcml_ray.push.signing import LEAF_BYTES, SigningKey, digest, forgery, public_key, signed_bytes
from gcml_ray.push.wire import Buffer, Expectation, PushHeader, TensorSpec, checksum

LAYOUT = (TensorSpec("weight", (2, 4), "float32", 0),)
VALUES: Buffer = np.arange(8, dtype=np.float32)
EXPECTED = Expectation("run", frozenset("AB"), "net", "ct", LAYOUT, 8, oldest_round=1, newest_round=9)
KEYS = {site: SigningKey() for site in "ABC"}
PUBLIC = {site: key.public_key for site, key in KEYS.items()}


def plain(sender: str = "A", *, round_number: int = 1, values: Buffer = VALUES) -> PushHeader:
    return PushHeader("run", round_number, sender, 5, "net", "ct", LAYOUT, 8, "float32", checksum(values), 12.5)


def signed(header: PushHeader, *, by: str = "A", receivers: tuple[str, ...] = ("C",)) -> PushHeader:
    (parcel,) = Outbox(WireConfig(), key=KEYS[by]).parcels(header, VALUES, receivers)
    return parcel.header


def inbox_of_c(*, keys: dict[str, str] | None = PUBLIC) -> Inbox:
    inbox = Inbox("C", is_signed=True)
    if keys is not None:
        inbox.register(keys)
    return inbox


def reason(header: PushHeader, values: Any = VALUES, inbox: Inbox | None = None) -> str:
    read = (inbox or inbox_of_c()).read(header, values, EXPECTED)
    return read if isinstance(read, str) else ""


# --- a push --------------------------------------------------------------------------------------


def test_push_signed_by_its_sender_is_taken() -> None:
    assert reason(signed(plain())) == ""


def test_unsigned_push_is_refused() -> None:
    assert reason(plain()) == "unsigned: pushes of this run are signed (wire.sign)"


def test_site_cannot_speak_for_another() -> None:
    """B signs with its own registered key what it says to be A's."""
    assert reason(signed(plain("A"), by="B")) == "signature: not made by the key of A"


def test_changed_buffer_is_refused_even_with_its_own_checksum() -> None:
    changed = VALUES + np.float32(1)
    header = replace(signed(plain()), checksum=checksum(changed))
    assert reason(header, changed) == "signature: not made by the key of A"
    header = replace(signed(plain(values=changed)), checksum=checksum(changed))
    assert reason(header, changed) == "signature: A has signed another buffer"


CHANGES: dict[str, Any] = {
    "run_id": "other",
    "round_number": 2,
    "sender": "B",
    "num_train": 500,
    "fingerprint": "tiny",
    "contract": "mr",
    "layout": (replace(LAYOUT[0], name="other"),),
    "num_values": 7,
    "dtype": "float16",
    "checksum": "0",
    "exported_at": 13.5,
    "encoding": "int8",
    "num_exact": 1,
    "base": "x",
    "receivers": ("B", "C"),
    "digest": "0",
}


@pytest.mark.parametrize("field", CHANGES)
def test_signature_covers_every_field(field: str) -> None:
    changed = replace(signed(plain()), **{field: CHANGES[field]})
    assert forgery(changed, public_key(PUBLIC["A"])) == f"signature: not made by the key of {changed.sender}"


def test_no_field_is_left_out_of_the_test_above() -> None:
    assert {*CHANGES, "signature"} == {*PushHeader.__dataclass_fields__}


def test_push_meant_for_others_is_refused() -> None:
    """B hands on to C what A has sent to B alone."""
    assert reason(signed(plain(), receivers=("B",))) == "signature: A has not sent this to C"


@pytest.mark.parametrize("signature", ["zz", "00", "00" * 64, "é"])
def test_signature_that_is_none_is_refused_not_raised(signature: str) -> None:
    assert reason(replace(signed(plain()), signature=signature)) == "signature: not made by the key of A"


# --- keys ----------------------------------------------------------------------------------------


def test_nothing_is_taken_before_the_keys_are_registered() -> None:
    assert reason(signed(plain()), inbox=inbox_of_c(keys=None)).startswith("not ready: the keys of this run")


def test_sender_without_a_registered_key_is_refused() -> None:
    inbox = inbox_of_c(keys={"B": PUBLIC["B"]})
    assert reason(signed(plain()), inbox=inbox) == "signature: no key of A is registered here"


def test_key_from_before_a_restart_is_worth_nothing() -> None:
    inbox = inbox_of_c()
    inbox.register(PUBLIC | {"A": SigningKey().public_key})
    assert reason(signed(plain()), inbox=inbox) == "signature: not made by the key of A"


@pytest.mark.parametrize("text", ["", "00", "x" * 64])
def test_public_key_that_is_none_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="a public key is 64 hexadecimal digits, got"):
        inbox_of_c(keys={"A": text})


def test_private_key_cannot_be_pickled() -> None:
    with pytest.raises(TypeError, match="never leaves the process that made it"):
        pickle.dumps(KEYS["A"])


def test_every_process_has_its_own_key() -> None:
    assert SigningKey().public_key != SigningKey().public_key


# --- digest --------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(data=st.data(), size=st.sampled_from([1, LEAF_BYTES - 1, LEAF_BYTES, LEAF_BYTES + 1, 9 * LEAF_BYTES]))
def test_digest_sees_any_changed_byte(data: st.DataObject, size: int) -> None:
    payload = np.zeros(size, dtype=np.uint8)
    before = digest(payload)
    payload[data.draw(st.integers(0, size - 1))] = 1
    assert digest(payload) != before


def test_digest_sees_swapped_leaves_and_added_zeros() -> None:
    payload = np.repeat(np.arange(3, dtype=np.uint8), LEAF_BYTES)
    swapped = np.repeat(np.array([1, 0, 2], dtype=np.uint8), LEAF_BYTES)
    assert len({digest(payload), digest(swapped), digest(np.append(payload, np.uint8(0)))}) == 3


def test_digest_is_the_same_in_one_thread_and_in_several() -> None:
    """16 leaves are shared among threads, one by one they are not; the leaves' hashes are the same bytes."""
    import hashlib  # noqa: PLC0415 - only here

    payload = np.random.default_rng(0).integers(0, 256, 16 * LEAF_BYTES + 5).astype(np.uint8)
    leaves = [payload[start : start + LEAF_BYTES].tobytes() for start in range(0, payload.size, LEAF_BYTES)]
    root = b"gcml-ray push payload 1\0" + payload.size.to_bytes(8, "big")
    root += b"".join(hashlib.sha256(leaf).digest() for leaf in leaves)
    assert digest(payload) == hashlib.sha256(root).hexdigest()


def test_signed_bytes_do_not_depend_on_how_a_header_came_to_be() -> None:
    header = signed(plain())
    assert signed_bytes(pickle.loads(pickle.dumps(header))) == signed_bytes(header)  # noqa: S301 - our own bytes
