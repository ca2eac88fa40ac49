"""One root seed, many independent generators: (root seed, purpose, site, round, ...) -> seed.

Nothing in gcml-ray keeps a running random state across rounds. Each round's generators are derived
anew from these keys, so a result depends neither on scheduling nor on where a run was resumed.
"""

from __future__ import annotations

import hashlib
import secrets

import numpy as np


def derive_seed(root: int, *keys: str | int) -> int:
    """A 63-bit seed that depends on the root seed and on every key, in order.

    Args:
        root: the federation's seed (``federation.seed``).
        keys: purpose first, e.g. ``derive_seed(7, "augment", "CS", 12)``.
    """
    text = "\x1f".join([str(root), *(f"{type(key).__name__}:{key}" for key in keys)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def secret_seed() -> int:
    """A 63-bit seed from the operating system's entropy, for privacy: noise that others can derive protects nothing."""
    return secrets.randbits(63)


def numpy_generator(root: int, *keys: str | int) -> np.random.Generator:
    """A NumPy generator for the given keys; see :func:`derive_seed`."""
    return np.random.default_rng(derive_seed(root, *keys))
