from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gcml_ray.config import OptimiserConfig
from gcml_ray.model.flat_optimiser import FlatOptimiser
from tests.unit.test_layers import in_fresh_process

OPTIONS: list[dict[str, Any]] = [
    {"name": "sgd"},
    {"name": "sgd", "momentum": 0.9},
    {"name": "adam"},
    {"name": "adam", "amsgrad": True},
    {"name": "adamw"},
]
GRADIENTS = [torch.tensor([1.0, -2.0, 0.5]), torch.tensor([-1.0, 3.0, 0.0]), torch.tensor([0.1, 0.2, -0.3])]


def parameter() -> nn.Parameter:
    one = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    one.grad = torch.zeros(3)
    return one


def of_torch(weights: nn.Parameter, config: OptimiserConfig) -> torch.optim.Optimizer:
    rate, decay = config.learning_rate, config.weight_decay
    if config.name == "sgd":
        return torch.optim.SGD([weights], lr=rate, momentum=config.momentum or 0.0, weight_decay=decay)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind([weights], lr=rate, weight_decay=decay, amsgrad=config.amsgrad, fused=True)


def set_gradient(weights: nn.Parameter, gradient: Tensor) -> None:
    assert weights.grad is not None
    weights.grad.copy_(gradient)


@pytest.mark.parametrize("options", OPTIONS)
def test_steps_are_those_of_the_class_bit_for_bit(options: dict[str, Any]) -> None:
    config = OptimiserConfig(learning_rate=0.1, weight_decay=0.01, **options)
    ours, theirs = parameter(), parameter()
    optimiser, reference = FlatOptimiser(ours, config), of_torch(theirs, config)
    for number, gradient in enumerate(GRADIENTS):
        optimiser.learning_rate = reference.param_groups[0]["lr"] = 0.1 / (1 + number)
        set_gradient(ours, gradient)
        set_gradient(theirs, gradient)
        optimiser.step()
        reference.step()
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, parameter())


@pytest.mark.parametrize("options", OPTIONS)
def test_a_scaler_unscales_and_leaves_out_a_step_with_infinite_gradients(options: dict[str, Any]) -> None:
    """Scaled by 4, with an overflow in the second step: then the scale is halved and nothing else happens."""
    config = OptimiserConfig(learning_rate=0.1, **options)
    scaled, plain = parameter(), parameter()
    optimiser, reference = FlatOptimiser(scaled, config), FlatOptimiser(plain, config)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, backoff_factor=0.5)
    for gradient, factor in ((GRADIENTS[0], 4.0), (torch.tensor([torch.inf, 0.0, 0.0]), 4.0), (GRADIENTS[1], 2.0)):
        scaler.scale(torch.zeros(()))  # type: ignore[no-untyped-call]  # makes the scale, as the loss does
        set_gradient(scaled, gradient * factor)
        scaler.step(optimiser)  # type: ignore[arg-type]
        scaler.update()
    for gradient in GRADIENTS[:2]:
        set_gradient(plain, gradient)
        reference.step()
    assert torch.equal(scaled, plain)
    assert scaler.get_scale() == 2.0


def test_a_site_trains_without_loading_the_compiler() -> None:
    program = """
import sys
from gcml_ray.lean_imports import import_monai
import_monai()
import torch
from gcml_ray.config import OptimiserConfig
from gcml_ray.model.learner import Learner
from gcml_ray.model.precision import Precision
for name in ("sgd", "adamw"):
    config = OptimiserConfig(name=name, learning_rate=0.1, clip_norm=1.0)
    learner = Learner(torch.nn.Linear(2, 1), send_buffers=True, optimiser=config, precision=Precision("cpu", "none"))
    learner.apply_gradients(learner.forward(torch.ones(1, 2))[0].sum())
print("torch.optim" in sys.modules, "torch._dynamo" in sys.modules)
"""
    assert in_fresh_process(program) == "True False"
