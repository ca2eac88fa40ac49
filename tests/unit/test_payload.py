"""Encodings of a push: what they keep, what they cost, and what becomes of what they lose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError

from gcml_ray.config.wire import WireConfig
from gcml_ray.push.inbox import Inbox
from gcml_ray.push.outbox import Outbox, Parcel
from gcml_ray.push.payload import BLOCK_VALUES, decode, decode_difference, encode, encode_difference, payload_size
from gcml_ray.push.wire import Buffer, Expectation, PushHeader, checksum
from gcml_ray.records import PushReceipt
from tests.fakes import fake_config, final_weights
from tests.runs import run_locally

LOSSY = ("float16", "bfloat16", "int8")
FLOATS = st.floats(-1000, 1000, width=32)
VECTORS = arrays(np.float32, st.integers(1, 50), elements=FLOATS)
TOPK = WireConfig(encoding="topk", topk_share=0.25)


def values(size: int = 8, *, seed: int = 0) -> Buffer:
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def round_trip(vector: Buffer, encoding: str, *, num_exact: int = 0) -> Buffer:
    payload = encode(vector, encoding, num_exact=num_exact)
    assert payload.size == payload_size(encoding, vector.size, num_exact=num_exact)
    return decode(payload, encoding, num_values=vector.size, num_exact=num_exact)


# --- whole vectors -------------------------------------------------------------------------------


def test_float32_is_the_vector_itself() -> None:
    vector = values()
    assert encode(vector, "float32", num_exact=0) is vector
    assert decode(vector, "float32", num_values=8, num_exact=0) is vector


@settings(max_examples=100, deadline=None)
@given(vector=VECTORS)
def test_float16_rounds_to_eleven_bits(vector: Buffer) -> None:
    """Half a unit in the last place is 2^-11 of the value, or 2^-25 where it is subnormal."""
    limit = np.maximum(np.abs(vector) * 2.0**-11, 2.0**-25)
    assert (np.abs(round_trip(vector, "float16") - vector) <= limit).all()


@settings(max_examples=100, deadline=None)
@given(vector=VECTORS)
def test_bfloat16_rounds_to_eight_bits(vector: Buffer) -> None:
    limit = np.maximum(np.abs(vector) * 2.0**-8, 2.0**-133)
    assert (np.abs(round_trip(vector, "bfloat16") - vector) <= limit).all()


def test_bfloat16_rounds_ties_to_even() -> None:
    """1 + 2^-8 lies between 1 and 1 + 2^-7; 1 + 3 x 2^-8 between 1 + 2^-7 and 1 + 2^-6."""
    vector = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8], dtype=np.float32)
    assert round_trip(vector, "bfloat16").tolist() == [1.0, 1 + 2**-6, -1.0]


@settings(max_examples=100, deadline=None)
@given(vector=VECTORS)
def test_int8_is_off_by_half_a_step_at_most(vector: Buffer) -> None:
    """A step is the largest magnitude / 127; float32 arithmetic adds a little."""
    step = np.abs(vector).max() / 127
    assert (np.abs(round_trip(vector, "int8") - vector) <= step * 0.5001 + 1e-38).all()


def test_int8_has_a_scale_for_each_block() -> None:
    """Worked by hand: 127 in the first block is code 127 x 1, 0.5 x 127 in the second is code 127 x 0.5."""
    vector = np.zeros(BLOCK_VALUES + 2, dtype=np.float32)
    vector[:2] = 127, 1
    vector[-2:] = 63.5, 0.5
    payload = encode(vector, "int8", num_exact=0)
    assert payload[:8].view(np.float32).tolist() == [1.0, 0.5]
    codes = payload[8:].view(np.int8)
    assert (codes[0], codes[1], codes[-2], codes[-1]) == (127, 1, 127, 1)
    assert decode(payload, "int8", num_values=vector.size, num_exact=0).tolist() == vector.tolist()


@pytest.mark.parametrize("encoding", LOSSY)
@pytest.mark.parametrize("vector", [np.zeros(5), np.full(5, 1e-45), np.full(5, -1e-38)])
def test_zeros_and_the_smallest_numbers_stay_finite_and_small(encoding: str, vector: Any) -> None:
    assert np.abs(round_trip(vector.astype(np.float32), encoding)).max() <= 1.1e-38


@pytest.mark.parametrize(("encoding", "bytes_of_1000"), [("float16", 2000), ("bfloat16", 2000), ("int8", 1004)])
def test_bytes_on_the_wire(encoding: str, bytes_of_1000: int) -> None:
    assert encode(values(1000), encoding, num_exact=0).nbytes == bytes_of_1000
    assert encode(values(1003), encoding, num_exact=3).nbytes == bytes_of_1000 + 12


@pytest.mark.parametrize("encoding", LOSSY)
@pytest.mark.parametrize("num_exact", [1, 3, 8])
def test_statistics_at_the_end_are_never_rounded(encoding: str, num_exact: int) -> None:
    vector = values()
    decoded = round_trip(vector, encoding, num_exact=num_exact)
    assert decoded[-num_exact:].tolist() == vector[-num_exact:].tolist()


@pytest.mark.parametrize("value", [65520.0, -1e9])
def test_weight_too_large_for_float16_is_an_error_with_words(value: float) -> None:
    with pytest.raises(OverflowError, match=r"largest weight is .*float16 cannot hold: .* wire\.encoding"):
        encode(np.array([1, value], dtype=np.float32), "float16", num_exact=0)


@pytest.mark.parametrize("encoding", LOSSY)
@pytest.mark.parametrize("value", [np.nan, np.inf, np.finfo(np.float32).max])
def test_what_would_not_arrive_finite_does_not_leave(encoding: str, value: float) -> None:
    vector = np.array([1, value, 1], dtype=np.float32)
    with pytest.raises(OverflowError, match=f"which {encoding} cannot hold"):
        encode(vector, encoding, num_exact=0)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FFF9000, 0x7FC00000])
def test_no_nan_becomes_a_number_in_bfloat16(bits: int) -> None:
    """Rounding by adding 0x7FFF carries the first three over the sign: they would arrive as zeros."""
    vector = np.array([bits], dtype=np.uint32).view(np.float32)
    with pytest.raises(OverflowError, match="which bfloat16 cannot hold"):
        encode(vector, "bfloat16", num_exact=0)


# --- differences -----------------------------------------------------------------------------------


def test_largest_differences_are_sent_the_others_wait() -> None:
    """Differences 0, 1, -3, 2 to a base of ones; half of four values are two: -3 and 2."""
    base = np.ones(4, dtype=np.float32)
    payload = encode_difference(base + np.array([0, 1, -3, 2], np.float32), base, share=0.5, num_exact=0)
    assert decode_difference(payload, base, num_exact=0).tolist() == [1, 1, -2, 3]
    assert base.tolist() == [1, 1, 1, 1]


def test_places_are_a_list_where_they_are_few_and_a_bitmap_where_they_are_many() -> None:
    """6400 values: a bitmap is 800 bytes, as are 200 places. A prefix of 8 bytes, 2 bytes a value."""
    vector, base = values(6400), np.zeros(6400, dtype=np.float32)
    assert encode_difference(vector, base, share=100 / 6400, num_exact=0).nbytes == 8 + 4 * 100 + 2 * 100
    assert encode_difference(vector, base, share=0.5, num_exact=0).nbytes == 8 + 800 + 2 * 3200


@settings(max_examples=100, deadline=None)
@given(vector=VECTORS, share=st.floats(0.01, 1), num_exact=st.integers(0, 1))
def test_difference_leads_to_the_sent_values_and_keeps_the_others(vector: Buffer, share: float, num_exact: int) -> None:
    base = values(vector.size)
    decoded = decode_difference(
        encode_difference(vector, base, share=share, num_exact=num_exact), base, num_exact=num_exact
    )
    is_near = np.abs(decoded - vector) <= np.abs(vector - base) * 2.0**-10 + 1e-4
    assert (is_near | (decoded == base)).all()
    num_encoded = vector.size - num_exact
    assert is_near[:num_encoded].sum() >= min(num_encoded, round(share * num_encoded))
    assert decoded[num_encoded:].tolist() == vector[num_encoded:].tolist()


@pytest.mark.parametrize("share", [0.1, 0.9], ids=["list", "bitmap"])
def test_spoilt_difference_is_an_error_or_another_vector_never_a_crash(share: float) -> None:
    base = np.zeros(320, dtype=np.float32)
    good = encode_difference(values(320), base, share=share, num_exact=2)
    random = np.random.default_rng(5)
    refused = 0
    for _ in range(300):
        bad = good.copy()
        bad[random.integers(0, 60)] = random.integers(0, 256)
        try:
            assert decode_difference(bad, base, num_exact=2).shape == (320,)
        except ValueError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("size", [0, 3, 7, 9, 100])
def test_difference_of_a_wrong_size_is_an_error(size: int) -> None:
    with pytest.raises(ValueError, match="bytes"):
        decode_difference(np.zeros(size, dtype=np.uint8), np.zeros(2, np.float32), num_exact=0)


@pytest.mark.parametrize("places", [(1, 1), (2, 1), (1, 4)])
def test_places_twice_out_of_order_or_beyond_are_an_error(places: tuple[int, int]) -> None:
    words = np.array([2, 0, *places], dtype=np.uint32).view(np.uint8)
    payload = np.concatenate([words, np.ones(2, np.float16).view(np.uint8)])
    with pytest.raises(ValueError, match="distinct"):
        decode_difference(payload, np.zeros(4, np.float32), num_exact=0)


# --- from outbox to inbox --------------------------------------------------------------------------


def header(vector: Buffer, *, round_number: int = 1, num_exact: int = 0) -> PushHeader:
    plain = PushHeader("run", round_number, "A", 5, "", "", (), vector.size, "float32", checksum(vector))
    return PushHeader(**{**plain.__dict__, "num_exact": num_exact})


def expected(vector: Buffer, *, num_exact: int = 0) -> Expectation:
    return Expectation("run", frozenset("A"), "", "", (), vector.size, 0, 99, num_exact)


class Link:
    """One sender and receivers, without a network between them."""

    def __init__(self, wire: WireConfig, receivers: str = "B") -> None:
        self.wire = wire
        self.outbox = Outbox(wire, key=None)
        self.inboxes = {name: Inbox(name, wire=wire) for name in receivers}

    def push(self, vector: Buffer, receivers: str = "B") -> dict[str, Buffer | str]:
        """What each receiver reads; receipts go back."""
        arrived: dict[str, Buffer | str] = {}
        for parcel in self.outbox.parcels(header(vector), vector, tuple(receivers)):
            for name in parcel.receivers:
                arrived[name] = self.receive(parcel, name, vector)
        return arrived

    def receive(self, parcel: Parcel, name: str, vector: Buffer) -> Buffer | str:
        """One receiver's answer, and its receipt."""
        read = self.inboxes[name].read(parcel.header, parcel.payload, expected(vector))
        reason = read if isinstance(read, str) else ""
        if not isinstance(read, str):
            self.inboxes[name].keep("A", read)
        self.outbox.acknowledge([PushReceipt(1, "A", name, not reason, reason, parcel.payload.nbytes)])
        return read


@pytest.mark.parametrize("wire", [WireConfig(), *[WireConfig(encoding=e) for e in LOSSY], TOPK], ids=str)  # type: ignore[arg-type]
def test_what_arrives_is_near_finite_and_read_only(wire: WireConfig) -> None:
    vector = values(100)
    arrived = Link(wire).push(vector)["B"]
    assert isinstance(arrived, np.ndarray)
    assert arrived.dtype == np.float32
    assert not arrived.flags.writeable
    np.testing.assert_allclose(arrived, vector, atol=0.02)


@pytest.mark.parametrize("encoding", LOSSY)
def test_what_one_push_loses_is_added_to_the_next(encoding: Any) -> None:
    """The mean of n pushes of one vector is off by the last loss / n: less than any single push."""
    vector, link = values(100), Link(WireConfig(encoding=encoding))
    pushes = [link.push(vector)["B"] for _ in range(64)]
    single = np.abs(np.asarray(pushes[0]) - vector).max()
    mean = np.mean([np.asarray(push, dtype=np.float64) for push in pushes], axis=0)
    assert 0 < np.abs(mean - vector).max() <= 2.5 * single / 64


def test_differences_reach_a_constant_after_as_many_pushes_as_the_share_asks() -> None:
    """Whole once; then the vector changes everywhere, and a quarter of it goes with each of four pushes."""
    before, after, link = values(100), values(100, seed=1), Link(TOPK)
    assert np.array_equal(link.push(before)["B"], before)
    distances = [np.abs(np.asarray(link.push(after)["B"]) - after).max() for _ in range(4)]
    assert distances[0] > 0.1
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 2e-3


def test_each_receiver_gets_the_difference_to_what_it_has() -> None:
    """B has the first push, C none: B gets a difference, C the whole vector; then both have the same base but one."""
    link, vectors = Link(TOPK, "BC"), [values(100, seed=seed) for seed in range(3)]
    link.push(vectors[0], "B")
    second = {p.receivers: p.header.encoding for p in link.outbox.parcels(header(vectors[1]), vectors[1], ("B", "C"))}
    assert second == {("B",): "topk", ("C",): "float32"}


def test_receivers_with_the_same_base_share_one_payload() -> None:
    link = Link(TOPK, "BC")
    link.push(values(100), "BC")
    (parcel,) = link.outbox.parcels(header(values(100, seed=1)), values(100, seed=1), ("B", "C"))
    assert (parcel.header.encoding, parcel.receivers) == ("topk", ("B", "C"))


def test_receiver_that_lost_its_base_refuses_and_gets_the_whole_vector_next() -> None:
    link, vector = Link(TOPK), values(100)
    link.push(vector)
    link.inboxes["B"] = Inbox("B", wire=TOPK)
    assert str(link.push(vector + 1)["B"]).startswith("base: what A sent before is not here")
    assert np.array_equal(link.push(vector + 1)["B"], vector + 1)


def test_difference_to_another_base_than_the_receivers_is_refused() -> None:
    """B has taken a second push of which A does not know."""
    link, vector = Link(TOPK), values(100)
    link.push(vector)
    link.inboxes["B"].keep("A", vector + 1)
    assert str(link.push(vector)["B"]).startswith("base: ")


def test_sender_that_lost_an_answer_sends_the_whole_vector_next() -> None:
    link, vector = Link(TOPK), values(100)
    link.push(vector)
    link.outbox.acknowledge([PushReceipt(1, "A", "B", False, "unreachable: the receiver did not answer in time", 1)])
    (parcel,) = link.outbox.parcels(header(vector), vector, ("B",))
    assert parcel.header.encoding == "float32"


def test_difference_beyond_float16_is_sent_whole() -> None:
    link, vector = Link(TOPK), values(100)
    link.push(vector)
    far = vector + np.float32(1e6)
    assert np.array_equal(link.push(far)["B"], far)


def test_bases_do_not_change_with_the_weights_of_the_sender() -> None:
    """The trainer goes on in the memory it gave to push. All differences are 1; a quarter of 100 values is sent."""
    link, vector = Link(TOPK), values(100)
    first = np.array(link.push(vector)["B"])
    vector += 1
    assert np.sum(np.asarray(link.push(vector)["B"]) > first + 0.9) == 25


def test_encoding_that_was_not_agreed_on_is_refused() -> None:
    vector = values()
    (parcel,) = Outbox(WireConfig(encoding="int8"), key=None).parcels(header(vector), vector, ("B",))
    read = Inbox("B").read(parcel.header, parcel.payload, expected(vector))
    assert read == "encoding: int8 is not float32"


# --- configuration and runs ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"encoding": "topk"}, "encoding topk needs topk_share"),
        ({"topk_share": 0.1}, "topk_share would be ignored by encoding float32"),
        ({"encoding": "topk", "topk_share": 0.0}, "greater than 0"),
        ({"encoding": "int4"}, "Input should be"),
    ],
)
def test_section_that_contradicts_itself_is_an_error(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        WireConfig.model_validate(section)


def test_signing_does_not_change_what_a_run_is_but_an_encoding_does(tmp_path: Path) -> None:
    plain, signed, int8 = (
        fake_config(tmp_path, wire=wire).identity for wire in ({}, {"sign": True}, {"encoding": "int8"})
    )
    assert plain == signed != int8


@pytest.mark.parametrize(
    ("placement", "sign", "signs"),
    [("label", None, True), ("none", None, False), ("none", True, True), ("label", False, False)],
)
def test_pushes_are_signed_by_default_where_sites_have_their_own_nodes(
    tmp_path: Path, placement: str, sign: bool | None, signs: bool
) -> None:
    config = fake_config(tmp_path, resources={"pool": "ray", "placement": placement}, wire={"sign": sign})
    assert config.signs_pushes is signs


@pytest.mark.parametrize("method", [{"name": "gcml", "topology": {"name": "ring"}}, {"name": "fedavg"}], ids=str)
@pytest.mark.parametrize("sign", [False, True])
def test_signatures_do_not_change_a_run(tmp_path: Path, method: dict[str, Any], sign: bool) -> None:
    plain = run_locally(fake_config(tmp_path / "plain", method=method))
    other = run_locally(fake_config(tmp_path / "other", method=method, wire={"sign": sign}))
    assert other.failures() == []
    assert all(push.accepted for record in other.listener.rounds for push in record.pushes)
    wanted, weights = final_weights(plain.folder), final_weights(other.folder)
    assert {site: vector.tolist() for site, vector in weights.items()} == {k: v.tolist() for k, v in wanted.items()}


@pytest.mark.parametrize("method", [{"name": "gcml", "topology": {"name": "ring"}}, {"name": "fedavg"}], ids=str)
@pytest.mark.parametrize(
    ("wire", "bytes_of_8"),
    [
        ({"encoding": "float16"}, {16}),
        ({"encoding": "bfloat16"}, {16}),
        ({"encoding": "int8"}, {12}),
        ({"encoding": "topk", "topk_share": 0.25}, {32, 8 + 4 + 4}),
    ],
    ids=str,
)
def test_run_with_an_encoding_ends_near_the_plain_run(
    tmp_path: Path, method: dict[str, Any], wire: dict[str, Any], bytes_of_8: set[int]
) -> None:
    """Eight weights: two bytes each; a scale and a byte each; two places in a bitmap of a word and two values."""
    plain = run_locally(fake_config(tmp_path / "plain", method=method))
    other = run_locally(fake_config(tmp_path / "other", method=method, wire=wire | {"sign": True}))
    pushes = [push for record in other.listener.rounds for push in record.pushes]
    assert pushes
    assert all(push.accepted for push in pushes)
    assert {push.size_bytes for push in pushes} == bytes_of_8
    if wire["encoding"] != "topk":
        for site, vector in final_weights(plain.folder).items():
            np.testing.assert_allclose(final_weights(other.folder)[site], vector, atol=0.05)
