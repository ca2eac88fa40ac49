"""Ed25519 signatures of pushes: a site cannot speak for another.

A key pair is made in a site's own process when it starts. The private key never leaves that process and is not written
to disk; the public one is told to the driver, which registers it with all other sites. A signature (RFC 8032) covers
every field of the header, and through its ``digest`` the bytes that travel beside it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from gcml_ray.cores import num_usable_cpus
from gcml_ray.push.wire import Payload, PushHeader

LEAF_BYTES = 2**20
MAX_THREADS = 4
_HEADER_MARK = b"gcml-ray push header 1\0"  # a signature made for one purpose is good for no other
_DIGEST_MARK = b"gcml-ray push payload 1\0"


class SigningKey:
    """The private key of one process; it signs and cannot be pickled.

    Attributes:
        public_key: the public half, 64 hexadecimal digits.
    """

    def __init__(self) -> None:
        self._private = Ed25519PrivateKey.generate()
        self.public_key = self._private.public_key().public_bytes_raw().hex()

    def sign(self, header: PushHeader, payload: Payload) -> PushHeader:
        """The header with the payload's digest and the signature over all of it."""
        described = dataclasses.replace(header, digest=digest(payload), signature="")
        return dataclasses.replace(described, signature=self._private.sign(signed_bytes(described)).hex())

    def __reduce__(self) -> NoReturn:
        raise TypeError("a private key never leaves the process that made it")


def public_key(text: str) -> Ed25519PublicKey:
    """A public key from its 64 hexadecimal digits.

    Raises:
        ValueError: the text is not a public key.
    """
    try:
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(text))
    except ValueError as error:
        raise ValueError(f"a public key is 64 hexadecimal digits, got {text!r}") from error


def forgery(header: PushHeader, key: Ed25519PublicKey | None) -> str:
    """Why a header is not its sender's own; empty where its signature is good.

    The signature holds for the ``digest`` in the header, not yet for any payload: see :func:`digest`.

    Args:
        header: a header whose fields have their types (``wire.malformed``).
        key: the key registered for its sender; None where there is none.
    """
    if not header.signature:
        return "unsigned: pushes of this run are signed (wire.sign)"
    if key is None:
        return f"signature: no key of {header.sender} is registered here"
    try:
        key.verify(bytes.fromhex(header.signature), signed_bytes(header))
    except (InvalidSignature, ValueError):
        return f"signature: not made by the key of {header.sender}"
    return ""


def signed_bytes(header: PushHeader) -> bytes:
    """All fields but the signature, in one form: JSON with sorted keys, ASCII."""
    fields = dataclasses.asdict(header)
    del fields["signature"]
    return _HEADER_MARK + json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def digest(payload: Payload) -> str:
    """A cryptographic hash of what travels: SHA-256 over the SHA-256 of each MiB, and the size.

    The leaves are hashed in up to four threads (hashlib works without the interpreter's lock), so that a large model
    costs less time where cores are free.
    """
    raw = np.ascontiguousarray(payload).view(np.uint8)
    leaves = range(0, raw.size, LEAF_BYTES)
    useful = min(MAX_THREADS, len(leaves) // 4)
    num_threads = min(useful, num_usable_cpus()) if useful > 1 else 1
    parts = [
        leaves[index * len(leaves) // num_threads : (index + 1) * len(leaves) // num_threads]
        for index in range(num_threads)
    ]

    def of_part(starts: range) -> bytes:
        return b"".join(hashlib.sha256(raw[start : start + LEAF_BYTES].data).digest() for start in starts)

    if num_threads == 1:
        hashes = of_part(leaves)
    else:
        with ThreadPoolExecutor(num_threads) as pool:
            hashes = b"".join(pool.map(of_part, parts))
    return hashlib.sha256(_DIGEST_MARK + raw.size.to_bytes(8, "big") + hashes).hexdigest()
