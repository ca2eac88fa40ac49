"""Noise that hides: nobody can try all of its streams."""

from __future__ import annotations

import pytest
import torch

from gcml_ray.privacy.noise import Noise

CPU = torch.device("cpu")
VALUES = torch.zeros(50, 400)


def test_noise_is_standard_normal_in_the_shape_of_what_it_hides() -> None:
    noise = Noise(CPU, 1).like(VALUES)
    assert noise.shape == VALUES.shape
    assert noise.dtype == torch.float32
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1.0) < 0.03


def test_all_bits_of_a_seed_count() -> None:
    """Torch's own generator on a CPU gives the same noise for seeds that differ above their lowest 32 bits."""
    high, higher = 5 + (1 << 40), 5 + (1 << 100)
    first, second, third = (Noise(CPU, seed).like(VALUES) for seed in (5, high, higher))
    assert not torch.equal(first, second)
    assert not torch.equal(first, third)
    assert not torch.equal(second, third)


def test_secret_noise_has_a_key_of_128_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def randbits(bits: int) -> int:
        asked.append(bits)
        return 7

    monkeypatch.setattr("gcml_ray.privacy.noise.secrets.randbits", randbits)
    assert torch.equal(Noise(CPU).like(VALUES), Noise(CPU, 7).like(VALUES))
    assert asked == [128]


def test_a_seed_repeats_its_noise_and_no_seed_never_does() -> None:
    noise = Noise(CPU, 3)
    first, second = noise.like(VALUES), noise.like(VALUES)
    assert not torch.equal(first, second)
    noise.restart(3)
    assert torch.equal(noise.like(VALUES), first)
    noise.restart(None)
    secret = noise.like(VALUES)
    noise.restart(None)
    assert not torch.equal(noise.like(VALUES), secret)
    assert not torch.equal(Noise(CPU).like(VALUES), Noise(CPU).like(VALUES))
