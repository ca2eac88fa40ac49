"""What leaves a site: a model as its trainer gives it becomes payloads, encoded and signed as the run wants it.

Legend: S values of a push.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from gcml_ray.config.wire import WireConfig
from gcml_ray.push.payload import TOPK, decode, decode_difference, encode, encode_difference
from gcml_ray.push.signing import SigningKey
from gcml_ray.push.wire import UNREACHABLE, WIRE_DTYPE, Buffer, Payload, PushHeader, checksum
from gcml_ray.records import PushReceipt


@dataclass(frozen=True)
class Parcel:
    """One payload with its header, and to whom it goes."""

    header: PushHeader
    payload: Payload
    receivers: tuple[str, ...]


@dataclass(frozen=True)
class _Base:
    """What a receiver has of this site's weights, (S,), and its checksum."""

    name: str
    vector: Buffer


class Outbox:
    """Encodes and signs one site's pushes. Used by one thread at a time, but for :meth:`forget`.

    Args:
        wire: how pushes travel.
        key: signs them; None where the run does without.
    """

    def __init__(self, wire: WireConfig, *, key: SigningKey | None) -> None:
        self._wire = wire
        self._key = key
        self._lost: Buffer | None = None  # (S,) what the last push has lost; of differences the bases know it
        self._bases: dict[str, _Base] = {}
        self._sent: dict[str, _Base] = {}

    def parcels(self, header: PushHeader, vector: Buffer, receivers: Sequence[str]) -> list[Parcel]:
        """What to send for one push: one payload for all receivers, or one for each base that some of them have.

        Args:
            header: describes the plain vector.
            vector: (S,) the weights; only read. In float32 the payload is this vector, not a copy.
            receivers: their names.

        Raises:
            OverflowError: a weight is too large for the encoding.
        """
        if self._wire.encoding == TOPK:
            parcels = self._differences(header, vector, receivers)
        else:
            parcels = [Parcel(*self._whole(header, vector), tuple(receivers))]
        return [self._signed(parcel) for parcel in parcels]

    def acknowledge(self, receipts: Sequence[PushReceipt]) -> None:
        """Notes who has what now: differences start from it. Where that is not sure, the next push is whole."""
        for receipt in receipts:
            sent = self._sent.pop(receipt.receiver, None)
            if receipt.accepted and sent is not None:
                self._bases[receipt.receiver] = sent
            elif receipt.reason.startswith(("base:", UNREACHABLE)):
                self._bases.pop(receipt.receiver, None)

    def forget(self, receivers: Iterable[str]) -> None:
        """Takes note that these have a new process, which has nothing of this site: their next push is whole."""
        for receiver in receivers:
            self._bases.pop(receiver, None)

    def _whole(self, header: PushHeader, vector: Buffer) -> tuple[PushHeader, Payload]:
        """The vector and what the last push has lost, in the run's encoding."""
        encoding, num_exact = self._wire.encoding, header.num_exact
        if encoding == WIRE_DTYPE:
            return header, vector
        wanted = vector if self._lost is None else vector + self._lost
        payload = encode(wanted, encoding, num_exact=num_exact)
        self._lost = wanted - decode(payload, encoding, num_values=vector.size, num_exact=num_exact)
        self._lost[vector.size - num_exact :] = 0
        return replace(header, encoding=encoding, checksum=checksum(payload)), payload

    def _differences(self, header: PushHeader, vector: Buffer, receivers: Sequence[str]) -> list[Parcel]:
        """A difference for each base, the whole vector for those who have none."""
        groups: dict[str, list[str]] = {}
        for receiver in receivers:
            base = self._bases.get(receiver)
            groups.setdefault(base.name if base else "", []).append(receiver)
        return [
            self._difference(header, vector, self._bases.get(names[0]), tuple(names))
            for _, names in sorted(groups.items())
        ]

    def _difference(self, header: PushHeader, vector: Buffer, base: _Base | None, receivers: tuple[str, ...]) -> Parcel:
        """One parcel; the whole vector where a difference would not fit into float16."""
        payload: Payload = vector
        arrives = _Base(header.checksum, vector)
        if base is not None and self._wire.topk_share is not None:
            try:
                payload = encode_difference(
                    vector, base.vector, share=self._wire.topk_share, num_exact=header.num_exact
                )
            except OverflowError:
                base = None
            else:
                decoded = decode_difference(payload, base.vector, num_exact=header.num_exact)
                arrives = _Base(checksum(decoded), decoded)
                header = replace(header, encoding=TOPK, base=base.name, checksum=checksum(payload))
        if arrives.vector is vector:  # the trainer's own memory, which the next round writes to
            arrives = _Base(arrives.name, vector.copy())
        self._sent.update(dict.fromkeys(receivers, arrives))
        return Parcel(header, payload, receivers)

    def _signed(self, parcel: Parcel) -> Parcel:
        if self._key is None:
            return parcel
        header = replace(parcel.header, receivers=parcel.receivers)
        return replace(parcel, header=self._key.sign(header, parcel.payload))
