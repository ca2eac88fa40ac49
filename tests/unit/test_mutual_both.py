"""Each direction of mutual learning is the same whichever model comes first, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from gcml_ray.config import DcmlConfig
from gcml_ray.losses.mutual import mutual_divergences

VARIANTS = ("contrast", "contrast_hinge", "contrast_advantage", "contrast_soft", "regional", "mutual", "none")


@pytest.mark.parametrize(("classwise", "sigmoid"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_outputs", [2, 3])
def test_each_direction_is_the_same_whichever_model_comes_first_bit_for_bit(
    variant: str, num_outputs: int, classwise: bool, sigmoid: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(2, num_outputs, 4, 5, 3, generator=generator) * 3 for _ in range(2))
    second[0, :, 0] = first[0, :, 0] = 0  # ties
    target = torch.randint(0, 2, first.shape if sigmoid else (2, 1, 4, 5, 3), generator=generator)
    dcml = DcmlConfig(variant=variant, **({} if variant == "none" else {"classwise": classwise}))  # type: ignore[arg-type]
    one, other = first.clone().requires_grad_(), second.clone().requires_grad_()
    forth, back, statistics = mutual_divergences(one, other, target, dcml=dcml, sigmoid=sigmoid)
    if variant != "none":
        forth.backward()
        back.backward()
    for learner, peer, loss, gradient in ((first, second, forth, one.grad), (second, first, back, other.grad)):
        alone = learner.clone().requires_grad_()
        expected, _, seen = mutual_divergences(alone, peer, target, dcml=dcml, sigmoid=sigmoid)
        assert torch.equal(loss, expected)
        if variant != "none":
            expected.backward()
            assert torch.equal(gradient, alone.grad)
        assert learner is second or statistics == seen
