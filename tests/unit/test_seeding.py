import numpy as np
import pytest
import torch

from gcml_ray.seeding import derive_seed, numpy_generator

KEYS = ("augment", "CS", 12)


def test_same_keys_give_the_same_seed() -> None:
    assert derive_seed(7, *KEYS) == derive_seed(7, *KEYS)


@pytest.mark.parametrize(
    ("root", "keys"),
    [
        (8, ("augment", "CS", 12)),
        (7, ("order", "CS", 12)),
        (7, ("augment", "DU", 12)),
        (7, ("augment", "CS", 13)),
        (7, ("augment", "CS")),
        (7, ("augment", 12, "CS")),
        (7, ("augment", "CS", "12")),
        (7, ("augment", "CS1", 2)),
    ],
)
def test_every_key_its_order_and_its_type_count(root: int, keys: tuple[str | int, ...]) -> None:
    assert derive_seed(root, *keys) != derive_seed(7, *KEYS)


def test_a_seed_stays_the_same_between_versions() -> None:
    """A stored run could not be repeated otherwise: BLAKE2b of the keys, its first 8 bytes, without the lowest bit."""
    from hashlib import blake2b  # noqa: PLC0415 - the independent reckoning

    text = b"7\x1fstr:augment\x1fstr:CS\x1fint:12"
    assert derive_seed(7, *KEYS) == int(blake2b(text, digest_size=8).hexdigest(), 16) // 2


def test_seeds_fit_torch_and_numpy() -> None:
    seeds = [derive_seed(0, "x", number) for number in range(200)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62  # all bits are used
    for seed in seeds[:5]:
        torch.Generator().manual_seed(seed)
        np.random.default_rng(seed)


def test_generators_of_different_keys_are_unrelated() -> None:
    left, right = numpy_generator(7, "a"), numpy_generator(7, "b")
    assert abs(np.corrcoef(left.normal(size=2000), right.normal(size=2000))[0, 1]) < 0.1


def test_a_generator_starts_anew_each_time() -> None:
    assert np.array_equal(numpy_generator(7, "a").normal(size=5), numpy_generator(7, "a").normal(size=5))
