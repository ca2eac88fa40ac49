import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gcml_ray.config import DataConfig, NetworkConfig, OptimiserConfig
from gcml_ray.model.learner import Learner
from gcml_ray.model.precision import Precision
from gcml_ray.model.weights import FlatModel
from gcml_ray.networks.registry import BUILDERS, build_network, forward_heads
from gcml_ray.push.wire import TensorSpec

SMALL: dict[str, dict[str, Any]] = {
    "unet": {"channels": [4, 8], "strides": [2], "num_res_units": 1},
    "unet-batchnorm": {"channels": [4, 8], "strides": [2], "num_res_units": 1, "norm": "BATCH"},
    "dynunet": {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "filters": [4, 8, 8], "deep_supervision": True},
    "segresnet": {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
    "sanet_v1": {"nf": 4},
    "sanet_v2": {"nf": 8, "max_channels": 8},
}
SIDES = {"sanet_v1": (16, 16), "sanet_v2": (64, 32)}  # in 2D and 3D, where 8 does not do


def random_image(name: str, spatial_dims: int) -> Tensor:
    side = SIDES.get(name, (8, 8))[spatial_dims - 2]
    return torch.randn(2, 2, *(side,) * spatial_dims, generator=torch.Generator().manual_seed(0))


def with_batchnorm() -> nn.Sequential:
    """6 + 2 parameters of the linear layer, 2 + 2 of the norm, 2 + 2 running statistics, one counter."""
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def flat_linear() -> FlatModel:
    """A linear layer W x + b with the flat vector (1, 2, 3, 4, 5, 6)."""
    model = FlatModel(nn.Linear(2, 2), send_buffers=True)
    model.flat.copy_(torch.arange(1.0, 7.0))
    return model


def network(name: str, spatial_dims: int, seed: int) -> nn.Module:
    data = DataConfig(
        datalist="x.json",
        channels=("t1", "t2"),
        labels={"background": 0, "box": 1},
        spatial_dims=spatial_dims,  # type: ignore[arg-type]
        spacing_is_real=True,
        patch_size=(8,) * spatial_dims,
    )
    torch.manual_seed(seed)
    return build_network(NetworkConfig(name=name.partition("-")[0], options=SMALL[name]), data)


def with_frozen_encoder() -> nn.Sequential:
    """Frozen: 2 + 2 parameters in front; trained: 4 + 2 of a convolution; 4 statistics of a norm and 4 parameters."""
    encoder, norm, head = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)
    encoder.requires_grad_(False)
    return nn.Sequential(encoder, norm, head)


# --- layout ------------------------------------------------------------------------------------


def test_layout_lists_parameters_first_then_floating_point_buffers() -> None:
    assert FlatModel(with_batchnorm(), send_buffers=True).layout == (
        TensorSpec("0.weight", (2, 3), "float32", 0),
        TensorSpec("0.bias", (2,), "float32", 6),
        TensorSpec("1.weight", (2,), "float32", 8),
        TensorSpec("1.bias", (2,), "float32", 10),
        TensorSpec("1.running_mean", (2,), "float32", 12),
        TensorSpec("1.running_var", (2,), "float32", 14),
    )


@pytest.mark.parametrize(("send_buffers", "num_sent", "num_tensors"), [(True, 16, 6), (False, 12, 4)])
def test_sent_part_holds_buffers_only_where_asked(send_buffers: bool, num_sent: int, num_tensors: int) -> None:
    model = FlatModel(with_batchnorm(), send_buffers=send_buffers)
    assert (model.num_sent, len(model.sent_layout)) == (num_sent, num_tensors)
    assert (model.num_parameters, model.flat.numel(), model.gradient.numel()) == (12, 16, 12)


def test_integer_counters_are_no_part_of_the_flat_vector() -> None:
    model = FlatModel(with_batchnorm(), send_buffers=True)
    assert list(model.counters()) == ["1.num_batches_tracked"]
    assert not any("num_batches" in spec.name for spec in model.layout)


def test_other_number_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weight weight is torch\.float16; networks are built in torch\.float32"):
        FlatModel(nn.Linear(2, 2).half(), send_buffers=True)


def test_adopting_a_module_keeps_its_weights() -> None:
    torch.manual_seed(0)
    module = with_batchnorm()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    FlatModel(module, send_buffers=True)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


# --- views -------------------------------------------------------------------------------------


def test_output_follows_the_flat_vector() -> None:
    """Weight rows (1, 2) and (3, 4), bias (5, 6); x = (1, 10) gives 1 + 20 + 5 and 3 + 40 + 6."""
    model = flat_linear()
    assert model.module(torch.tensor([[1.0, 10.0]])).tolist() == [[26.0, 49.0]]
    model.flat[5] = 0.0
    assert model.module(torch.tensor([[1.0, 10.0]])).tolist() == [[26.0, 43.0]]


def test_gradients_land_in_the_flat_gradient() -> None:
    """d(sum y) / dW = x for each row, d(sum y) / db = 1; a second pass adds to the first."""
    model = flat_linear()
    for times in (1, 2):
        model.module(torch.tensor([[1.0, 10.0]])).sum().backward()
        assert model.gradient.tolist() == [times * value for value in (1, 10, 1, 10, 1, 1)]
    assert model.parameter.grad is model.gradient


def test_an_optimiser_step_on_the_flat_parameter_changes_the_module() -> None:
    model = flat_linear()
    model.gradient.copy_(torch.tensor([1.0, 1, 1, 1, 10, 10]))
    torch.optim.SGD([model.parameter], lr=0.1).step()
    assert model.module.state_dict()["bias"].tolist() == [4.0, 5.0]
    assert model.flat.tolist() == pytest.approx([0.9, 1.9, 2.9, 3.9, 4.0, 5.0])


def test_running_statistics_are_views_too() -> None:
    """Momentum 0.1 takes the running mean from 0 to 0.1 x the batch's mean, which is the bias for x = 0."""
    model = FlatModel(with_batchnorm(), send_buffers=True)
    model.flat[6:8] = torch.tensor([3.0, 5.0])
    model.module.train()(torch.zeros(4, 3))
    assert model.flat[12:14].tolist() == pytest.approx([0.3, 0.5])


# --- export, load, mix ---------------------------------------------------------------------------


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("name", list(SMALL))
def test_every_network_computes_the_same_after_export_and_load(name: str, spatial_dims: int) -> None:
    one, other = (FlatModel(network(name, spatial_dims, seed), send_buffers=True) for seed in (1, 2))
    image = random_image(name, spatial_dims)
    forward_heads(one.module.train(), image)  # moves running statistics, where there are any
    sent = one.flat[: one.num_sent].clone()
    expected = forward_heads(one.module.eval(), image)[0]
    assert not torch.equal(forward_heads(other.module.eval(), image)[0], expected)
    other.load(sent)
    assert torch.equal(forward_heads(other.module.eval(), image)[0], expected)


def test_the_networks_above_are_all_there_are() -> None:
    assert {name.partition("-")[0] for name in SMALL} == set(BUILDERS)


def test_adopting_leaves_a_networks_output_as_it_was() -> None:
    for name in SMALL:
        image = random_image(name, 3)
        expected = forward_heads(network(name, 3, 1).eval(), image)[0]
        flat = FlatModel(network(name, 3, 1), send_buffers=True)
        assert torch.equal(forward_heads(flat.module.eval(), image)[0], expected), name


@pytest.mark.parametrize(
    ("values", "is_finite"),
    [([3e38, 3e38], True), ([1.0, math.nan], False), ([1.0, math.inf], False), ([math.inf, -math.inf], False)],
)
def test_a_model_is_finite_where_all_its_values_are(values: list[float], is_finite: bool) -> None:
    """The sum of the first two overflows, and is infinite though neither of them is."""
    model = flat_linear()
    model.flat[:2] = torch.tensor(values)
    assert model.is_finite == is_finite


def test_kept_buffers_survive_load_and_mix() -> None:
    model = FlatModel(with_batchnorm(), send_buffers=False)
    model.load(torch.full((12,), 4.0))
    model.mix(torch.full((12,), 8.0), own_share=0.5)
    assert model.flat.tolist() == [6.0] * 12 + [0.0] * 2 + [1.0] * 2  # running mean 0, running variance 1


def test_mix_weighs_the_own_weights_by_the_share() -> None:
    """0.25 x (1..6) + 0.75 x 10."""
    model = flat_linear()
    model.mix(torch.full((6,), 10.0), own_share=0.25)
    assert model.flat.tolist() == pytest.approx([7.75, 8.0, 8.25, 8.5, 8.75, 9.0])


@pytest.mark.parametrize(("share", "expected"), [(1.0, [1, 2, 3, 4, 5, 6]), (0.0, [10] * 6)])
def test_mix_at_its_ends_is_one_of_the_two_exactly(share: float, expected: list[float]) -> None:
    model = flat_linear()
    model.mix(torch.full((6,), 10.0), own_share=share)
    assert model.flat.tolist() == expected


def test_load_and_mix_never_write_to_what_came_in() -> None:
    buffer = np.arange(6, dtype=np.float32)
    buffer.flags.writeable = False
    model, incoming = flat_linear(), torch.from_numpy(buffer)
    model.mix(incoming, own_share=0.5)
    model.load(incoming)
    model.flat.zero_()
    assert buffer.tolist() == [0, 1, 2, 3, 4, 5]


# --- one flat vector against separate tensors ----------------------------------------------------


def _batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(8, 3, generator=generator), torch.randn(8, 2, generator=generator)) for _ in range(5)]


def _two_layers() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def _torch_optimiser(module: nn.Module, config: OptimiserConfig) -> torch.optim.Optimizer:
    """As torch's users write it: one parameter group over the separate tensors."""
    rate, decay = config.learning_rate, config.weight_decay
    if config.name == "sgd":
        return torch.optim.SGD(module.parameters(), lr=rate, momentum=config.momentum or 0.0, weight_decay=decay)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(module.parameters(), lr=rate, weight_decay=decay, amsgrad=config.amsgrad)


@pytest.mark.parametrize("clip_norm", [None, 0.05])
@pytest.mark.parametrize(
    "options",
    [
        {"name": "sgd"},
        {"name": "sgd", "momentum": 0.9},
        {"name": "adam"},
        {"name": "adamw"},
        {"name": "adam", "amsgrad": True},
    ],
)
def test_steps_on_the_flat_vector_equal_steps_on_separate_tensors(
    options: dict[str, Any], clip_norm: float | None
) -> None:
    config = OptimiserConfig(learning_rate=0.05, weight_decay=0.1, clip_norm=clip_norm, **options)
    plain, module = _two_layers(), _two_layers()
    learner = Learner(module, send_buffers=True, optimiser=config, precision=Precision("cpu", "none"))
    optimiser = _torch_optimiser(plain, config)
    for x, y in _batches():
        optimiser.zero_grad()
        (plain(x) - y).square().mean().backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(plain.parameters(), clip_norm)
        optimiser.step()
        learner.apply_gradients((module(x) - y).square().mean())
    expected = torch.cat([parameter.detach().reshape(-1) for parameter in plain.parameters()])
    assert not torch.allclose(expected, torch.cat([p.detach().reshape(-1) for p in _two_layers().parameters()]))
    torch.testing.assert_close(learner.model.flat, expected, rtol=1e-5, atol=1e-6)


# --- frozen parameters -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("send_buffers", "keep_norms", "num_sent"), [(True, False, 14), (False, False, 10), (False, True, 6)]
)
def test_frozen_parameters_come_last_and_are_not_sent(send_buffers: bool, keep_norms: bool, num_sent: int) -> None:
    model = FlatModel(with_frozen_encoder(), send_buffers=send_buffers, keep_norms=keep_norms)
    assert (model.num_parameters, model.num_frozen, model.num_sent, model.flat.numel()) == (10, 4, num_sent, 18)
    assert [spec.name for spec in model.layout][-2:] == ["0.weight", "0.bias"]
    assert not {"0.weight", "0.bias"} & {spec.name for spec in model.sent_layout}


def test_neither_weight_decay_nor_a_push_changes_frozen_parameters() -> None:
    learner = Learner(
        with_frozen_encoder(),
        send_buffers=True,
        optimiser=OptimiserConfig(name="adamw", learning_rate=0.1, weight_decay=0.5, clip_norm=1.0),
        precision=Precision("cpu", "none"),
    )
    before = {name: value.clone() for name, value in learner.model.module.state_dict().items()}
    learner.apply_gradients(learner.forward(torch.ones(2, 1, 2, 2))[0].square().mean())
    learner.model.mix(torch.full((14,), 7.0), own_share=0.5)
    after = learner.model.module.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed >= {"1.weight", "1.running_mean", "2.weight", "2.bias"}
    assert not {"0.weight", "0.bias"} & changed


def test_a_network_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="requires_grad=False"):
        FlatModel(nn.Linear(2, 2).requires_grad_(False), send_buffers=True)
