"""Compiled training steps: the same numbers as without, compiled once for all models of an architecture."""

from __future__ import annotations

import shutil
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from gcml_ray.config import OptimiserConfig
from gcml_ray.data.site_data import Batch
from gcml_ray.errors import ConfigError
from gcml_ray.model import compilation
from gcml_ray.model.compilation import compile_ahead
from gcml_ray.model.learner import Learner, local_step
from gcml_ray.model.precision import Precision

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
SHAPE = (2, 1, 8, 8)


class Network(nn.Module):
    """A convolution, statistics and dropout: all that a step could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.0), nn.Conv2d(4, 2, 1)
        )

    def forward(self, image: Tensor) -> Tensor:
        output: Tensor = self.layers(image)
        return output


def learner(seed: int, *, is_compiled: bool) -> Learner:
    """With weights by seed."""
    torch.manual_seed(seed)
    optimiser = OptimiserConfig(name="sgd", learning_rate=0.1)
    return Learner(
        Network(),
        send_buffers=True,
        optimiser=optimiser,
        precision=Precision("cpu", "none"),
        is_compiled=is_compiled,
    )


def batch(seed: int) -> Batch:
    """Random patches and targets."""
    draw = torch.Generator().manual_seed(seed)
    image = torch.randn(SHAPE, generator=draw)
    return Batch(image=image, label=(image > 0).float())


def loss(heads: list[Tensor], label: Tensor) -> Tensor:
    """Any."""
    return (heads[0].softmax(1)[:, 1:] - label).square().mean()


def num_graphs() -> int:
    """How many graphs this process has compiled."""
    return int(counters["stats"]["unique_graphs"])


@needs_compiler
def test_compiled_steps_end_at_the_weights_of_plain_ones_and_models_share_what_was_compiled() -> None:
    before = num_graphs()
    for seed in (1, 2):
        one, other = learner(seed, is_compiled=False), learner(seed, is_compiled=True)
        start = one.model.flat.clone()
        for step in range(3):
            local_step(one, batch(step), loss)
            local_step(other, batch(step), loss)
        assert not torch.allclose(one.model.flat, start, atol=1e-3)
        torch.testing.assert_close(other.model.flat, one.model.flat, rtol=1e-5, atol=1e-6)
    assert num_graphs() == before + 1


@needs_compiler
def test_compiling_ahead_changes_nothing_and_leaves_nothing_to_the_first_step() -> None:
    torch._dynamo.reset()
    mine = learner(3, is_compiled=True)
    weights, generator = mine.model.flat.clone(), torch.get_rng_state()
    mine.compile_ahead(SHAPE)
    assert torch.equal(mine.model.flat, weights)
    assert torch.equal(torch.get_rng_state(), generator)
    assert int(mine.model.module.layers[1].num_batches_tracked) == 0  # type: ignore[index, union-attr]
    before = num_graphs()
    local_step(mine, batch(0), loss)
    assert num_graphs() == before


def test_what_cannot_be_compiled_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> list[Tensor]:
        raise RuntimeError("no C++ compiler\nmore of it")

    monkeypatch.setattr(compilation, "compiled_forward", lambda: fail)
    with pytest.raises(
        ConfigError, match=r"resources.compile: Network cannot .* \(no C\+\+ compiler\).* set resources"
    ):
        compile_ahead(Network(), torch.zeros(SHAPE), autocast=nullcontext())
