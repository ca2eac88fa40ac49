"""What comes into a site: checked, verified and decoded before anything else sees it.

Legend: S values of a push.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from gcml_ray.config.wire import WireConfig
from gcml_ray.push.payload import TOPK, decode, decode_difference, payload_size, wire_dtype
from gcml_ray.push.signing import digest, forgery, public_key
from gcml_ray.push.wire import (
    WIRE_DTYPE,
    Buffer,
    Expectation,
    Payload,
    PushHeader,
    all_finite,
    checksum,
    header_refusal,
    payload_refusal,
    scan,
)


class Inbox:
    """Turns payloads into plain vectors; safe to use from several threads.

    Args:
        site: whose inbox.
        wire: how pushes travel.
        is_signed: whether only signed pushes are taken.
    """

    def __init__(self, site: str = "", *, wire: WireConfig | None = None, is_signed: bool = False) -> None:
        self._site = site
        encoding = (wire or WireConfig()).encoding
        self._keeps_bases = encoding == TOPK
        self._encodings = frozenset({encoding, WIRE_DTYPE} if self._keeps_bases else {encoding})
        self._is_signed = is_signed
        self._lock = threading.Lock()
        self._keys: dict[str, Ed25519PublicKey] | None = None
        self._key_texts: dict[str, str] = {}
        self._bases: dict[str, tuple[str, Buffer]] = {}

    def register(self, keys: Mapping[str, str]) -> None:
        """Takes the public keys (hex) of all sites of the run, in place of those before.

        A sender with a new key is a new process: what the old one sent is no base any more.

        Raises:
            ValueError: a key cannot be read.
        """
        if not self._is_signed:
            return
        made = {site: public_key(text) for site, text in keys.items()}
        with self._lock:
            for site in self._key_texts:
                if keys.get(site) != self._key_texts[site]:
                    self._bases.pop(site, None)
            self._keys, self._key_texts = made, dict(keys)

    def read(self, header: Any, payload: Any, expected: Expectation) -> Buffer | str:
        """The vector (S,) that a push holds, read-only; or why it must not be taken.

        Args:
            header: the sender's header.
            payload: what arrived beside it; never written to. In float32 the vector is this memory.
            expected: the receiver's side of the contract.
        """
        reason = header_refusal(header, expected, encodings=self._encodings) or self._forgery(header)
        if reason:
            return reason
        size = payload_size(header.encoding, expected.num_values, num_exact=expected.num_exact)
        if reason := payload_refusal(payload, dtype=wire_dtype(header.encoding), size=size):
            return reason
        reason, is_finite = self._damage(header, payload)
        vector = reason or self._decoded(header, np.ascontiguousarray(payload))
        if isinstance(vector, str):
            return vector
        if not (all_finite(vector) if is_finite is None else is_finite):
            return "not finite: the weights hold NaN or infinity"
        vector.flags.writeable = False
        return vector

    def _damage(self, header: PushHeader, payload: Payload) -> tuple[str, bool | None]:
        """Why a payload is not what its sender has described, and whether its values are finite (see ``wire.scan``)."""
        found, is_finite = scan(payload)
        if found != header.checksum:
            return "checksum: the buffer is not the one the sender described", is_finite
        if self._is_signed and digest(payload) != header.digest:
            return f"signature: {header.sender} has signed another buffer", is_finite
        return "", is_finite

    def keep(self, sender: str, vector: Buffer) -> None:
        """Remembers a push that was taken, where the sender's next one may be a difference to it."""
        if not self._keeps_bases:
            return
        base = (checksum(vector), vector)
        with self._lock:
            self._bases[sender] = base

    def _forgery(self, header: PushHeader) -> str:
        if not self._is_signed:
            return ""
        keys = self._keys
        if keys is None:
            return "not ready: the keys of this run are not registered here yet"
        if reason := forgery(header, keys.get(header.sender)):
            return reason
        if self._site not in header.receivers:
            return f"signature: {header.sender} has not sent this to {self._site}"
        return ""

    def _decoded(self, header: PushHeader, payload: Payload) -> Buffer | str:
        """The vector of a payload of the right kind and size."""
        if header.encoding != TOPK:
            vector = decode(payload, header.encoding, num_values=header.num_values, num_exact=header.num_exact)
            # a base stays longer than its round: it must not hold on to the transport's memory
            return vector.copy() if self._keeps_bases else vector
        with self._lock:
            name, base = self._bases.get(header.sender, ("", None))
        if base is None or name != header.base:
            return f"base: what {header.sender} sent before is not here; its next push has to be whole"
        try:
            return decode_difference(payload, base, num_exact=header.num_exact)
        except ValueError as error:
            return f"topk: {error}"
