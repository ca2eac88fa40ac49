"""SA-Net: the published parameter counts, shapes and heads, attention, learning, and errors that say what to change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gcml_ray.config import DataConfig, LossConfig, NetworkConfig
from gcml_ray.errors import ConfigError
from gcml_ray.losses.segmentation import build_segmentation_loss
from gcml_ray.model.weights import FlatModel
from gcml_ray.networks.registry import build_network, check_sizes, fingerprint, forward_heads
from gcml_ray.networks.sanet import SaNetV1, SaNetV2
from gcml_ray.networks.sanet_blocks import ScaleAttention, norm

NAMES = ["sanet_v1", "sanet_v2"]
SIDES = {2: (64, 64), 3: (32, 64, 32)}  # multiples of 32, and more than one voxel at the coarsest level of v2


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    torch.manual_seed(0)


def data(spatial_dims: int = 2, **options: Any) -> DataConfig:
    """Two channels, three classes."""
    return DataConfig.model_validate(
        {
            "datalist": "cases.json",
            "channels": ["t1", "t2"],
            "labels": {"background": 0, "tumour": 1, "oedema": 2},
            "spatial_dims": spatial_dims,
            "spacing_is_real": True,
            "patch_size": SIDES[spatial_dims],
            **options,
        }
    )


def small(name: str, **options: Any) -> NetworkConfig:
    return NetworkConfig(name=name, options={"nf": 8, **options})


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- the check of a faithful re-implementation ----------------------------------------------------


@pytest.mark.parametrize(("nf", "published"), [(12, 4_124_700), (24, 16_484_544)])
@pytest.mark.parametrize("centre_norm", ["batch", "group"])
def test_v1_has_the_published_number_of_parameters(nf: int, published: int, centre_norm: str) -> None:
    with torch.device("meta"):
        assert num_parameters(SaNetV1(3, 4, 3, nf=nf, centre_norm=centre_norm)) == published


@pytest.mark.parametrize("thick_axis", [None, 2])
def test_v2_has_the_published_number_of_parameters(thick_axis: int | None) -> None:
    with torch.device("meta"):
        assert num_parameters(SaNetV2(3, 1, 2, nf=12, thick_axis=thick_axis)) == 10_312_711


@pytest.mark.parametrize(("name", "fewer"), [("sanet_v1", 3 * 8 * (2 + 4 + 8)), ("sanet_v2", 3 * 8 * (2 + 4 + 8) + 9)])
def test_without_deep_supervision_only_the_other_heads_are_missing(name: str, fewer: int) -> None:
    """Three outputs from 2, 4 and 8 nf channels; v2's heads have three biases each."""
    with torch.device("meta"):
        sizes = [num_parameters(build_network(small(name, deep_supervision=deep), data())) for deep in (True, False)]
    assert sizes[0] - sizes[1] == fewer


# --- shapes and heads -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("sanet_v1", [(32, 64, 32), (16, 32, 16), (8, 16, 8), (4, 8, 4)]),
        ("sanet_v2", [(32, 64, 32), (32, 32, 16), (16, 16, 8), (8, 8, 4)]),
    ],
)
def test_heads_in_3d_stand_at_their_own_scales(name: str, sizes: list[tuple[int, ...]]) -> None:
    heads = forward_heads(build_network(small(name), data(3)), torch.rand(1, 2, *SIDES[3]))
    assert [tuple(head.shape) for head in heads] == [(1, 3, *size) for size in sizes]


@pytest.mark.parametrize("name", NAMES)
def test_heads_in_2d_halve_from_scale_to_scale(name: str) -> None:
    heads = forward_heads(build_network(small(name), data()), torch.rand(2, 2, *SIDES[2]))
    assert [tuple(head.shape) for head in heads] == [(2, 3, side, side) for side in (64, 32, 16, 8)]


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_gives_the_main_head_alone(name: str) -> None:
    heads = forward_heads(build_network(small(name), data()).eval(), torch.rand(2, 2, *SIDES[2]))
    assert [tuple(head.shape) for head in heads] == [(2, 3, 64, 64)]


@pytest.mark.parametrize("name", NAMES)
def test_without_deep_supervision_training_gives_one_head(name: str) -> None:
    heads = forward_heads(build_network(small(name, deep_supervision=False), data()), torch.rand(2, 2, *SIDES[2]))
    assert [tuple(head.shape) for head in heads] == [(2, 3, 64, 64)]


@pytest.mark.parametrize("name", NAMES)
def test_main_head_of_training_is_the_head_of_evaluation(name: str) -> None:
    """Nothing is random without dropout; group normalisation in the centre keeps no statistics."""
    options: dict[str, Any] = {"dropout": 0.0, "centre_norm": "group"} if name == "sanet_v1" else {}
    module, image = build_network(small(name, **options), data()), torch.rand(2, 2, *SIDES[2])
    torch.testing.assert_close(forward_heads(module.train(), image)[0], forward_heads(module.eval(), image)[0])


def test_dropout_acts_on_heads_in_training_only() -> None:
    module, image = build_network(small("sanet_v1", centre_norm="group"), data()), torch.rand(1, 2, *SIDES[2])
    module.train()
    assert not torch.equal(forward_heads(module, image)[0], forward_heads(module, image)[0])
    module.eval()
    assert torch.equal(forward_heads(module, image)[0], forward_heads(module, image)[0])


def test_thick_axis_keeps_its_length_at_the_second_level() -> None:
    module = build_network(small("sanet_v2", thick_axis=2), data(3))
    second = forward_heads(module, torch.rand(1, 2, *SIDES[3]))[1]
    assert tuple(second.shape[2:]) == (16, 32, 32)


# --- attention ------------------------------------------------------------------------------------


def flat_maps() -> list[Tensor]:
    """Two scales, four channels, constant: 1 everywhere on the finer, 3 on the coarser."""
    return [torch.full((1, 4, 8, 8), 1.0), torch.full((1, 4, 4, 4), 3.0)]


def identity_attention(own: int) -> ScaleAttention:
    """Attention over two scales whose alignment changes sizes only."""
    block = ScaleAttention(2, [4, 4], [(2, 2)], own=own, activation=nn.ReLU())
    block.align[1 - own] = nn.Identity()
    return block


@pytest.mark.parametrize(("own", "side"), [(0, 8), (1, 4)])
def test_attention_without_preference_averages_the_scales(own: int, side: int) -> None:
    """Equal logits: shares 1/2 and 1/2, so 1/2 * 1 + 1/2 * 3 = 2, at the own scale."""
    block = identity_attention(own)
    nn.init.zeros_(block.excite.weight)
    torch.testing.assert_close(block(flat_maps()), torch.full((1, 4, side, side), 2.0))


def test_attention_weighs_scales_channel_by_channel() -> None:
    """Descriptor 1 + 3 = 4 a channel; squeeze weights 1/16 give 1; excitation ln 3 for channel 0 of the finer map.

    Channel 0: shares 3/4 and 1/4, so 3/4 * 1 + 1/4 * 3 = 1.5. The others stay at 2.
    """
    block = identity_attention(0)
    nn.init.constant_(block.squeeze[0].weight, 1 / 16)
    nn.init.zeros_(block.excite.weight)
    block.excite.weight.data[0] = torch.tensor(3.0).log()
    torch.testing.assert_close(block(flat_maps())[0, :, 0, 0], torch.tensor([1.5, 2.0, 2.0, 2.0]))


def test_finer_map_is_max_pooled_before_it_is_mixed() -> None:
    """A single 5 in each 2 x 2 window survives as 5: mean with a coarser map of 3 is 4."""
    fine = torch.zeros(1, 4, 8, 8)
    fine[:, :, ::2, 1::2] = 5.0
    block = identity_attention(1)
    nn.init.zeros_(block.excite.weight)
    torch.testing.assert_close(block([fine, flat_maps()[1]]), torch.full((1, 4, 4, 4), 4.0))


def test_group_norm_has_one_channel_a_group() -> None:
    """Each channel of each sample gets mean 0 and variance 1, however the others are scaled."""
    image = torch.rand(2, 4, 8, 8) * torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(1, 4, 1, 1)
    torch.testing.assert_close(norm(2, 4)(image), nn.GroupNorm(4, 4)(image))


# --- learning -------------------------------------------------------------------------------------


def loss_of(module: nn.Module, image: Tensor, target: Tensor) -> Tensor:
    """The PanSeg recipe: Jaccard and cross-entropy, heads weighed 1, 1/2, 1/4, 1/8."""
    loss = build_segmentation_loss(LossConfig(head_weights=(1.0, 0.5, 0.25, 0.125)), data())
    return loss(forward_heads(module, image), target)


def batch() -> tuple[Tensor, Tensor]:
    """A square of each class in noise, two channels."""
    target = torch.zeros(2, 1, *SIDES[2], dtype=torch.long)
    target[:, :, 8:32, 8:32], target[:, :, 32:56, 32:56] = 1, 2
    return torch.cat([target == 1, target == 2], 1) + 0.1 * torch.randn(2, 2, *SIDES[2]), target


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_every_parameter(name: str) -> None:
    module = build_network(small(name, nf=16), data())
    loss_of(module, *batch()).backward()
    without = [key for key, each in module.named_parameters() if each.grad is None or not each.grad.any()]
    assert without == []


@pytest.mark.parametrize("name", NAMES)
def test_one_step_reduces_the_loss_on_its_batch(name: str) -> None:
    module, (image, target) = build_network(small(name, dropout=0.0), data()), batch()
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-3, amsgrad=True)
    before = loss_of(module, image, target)
    before.backward()
    optimiser.step()
    assert loss_of(module, image, target).item() < before.item()


# --- weights that travel --------------------------------------------------------------------------


def test_batch_statistics_of_the_centre_are_sent_or_kept() -> None:
    """Three BatchNorms of 16 nf = 128 channels in the centre, a mean and a variance each."""
    sent, kept = (FlatModel(build_network(small("sanet_v1"), data()), send_buffers=send) for send in (True, False))
    assert sent.num_sent - kept.num_sent == 3 * 2 * 128


def test_group_norm_in_the_centre_leaves_no_buffers() -> None:
    assert list(build_network(small("sanet_v1", centre_norm="group"), data()).buffers()) == []


@pytest.mark.parametrize("name", NAMES)
def test_loaded_weights_predict_like_their_sender(name: str) -> None:
    """After a training pass, which moves the statistics too."""
    models = [FlatModel(build_network(small(name), data()), send_buffers=True) for _ in range(2)]
    image = torch.rand(2, 2, *SIDES[2])
    forward_heads(models[0].module, image)
    models[1].load(models[0].flat)
    ours, theirs = (forward_heads(model.module.eval(), image)[0] for model in models)
    assert torch.equal(ours, theirs)


# --- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_published_defaults_fit_a_patch(name: str) -> None:
    check_sizes(NetworkConfig(name=name), data(3))
    check_sizes(NetworkConfig(name=name), data(2))


def test_patch_that_does_not_divide_is_refused_with_the_divisor() -> None:
    """Four steps of 2."""
    with pytest.raises(
        ConfigError, match=r"patch_size \(64, 72\) does not fit.*multiple of \(16, 16\); \(64, 80\) fits"
    ):
        check_sizes(small("sanet_v1"), data(patch_size=(64, 72)))


@pytest.mark.parametrize(
    ("name", "options", "divisor"),
    [
        ("sanet_v1", {}, r"\(16, 16, 16\)"),
        ("sanet_v2", {}, r"\(16, 32, 32\)"),
        ("sanet_v2", {"thick_axis": 2}, r"\(32, 32, 16\)"),
    ],
)
def test_image_that_does_not_divide_is_refused_by_the_network(name: str, options: dict[str, Any], divisor: str) -> None:
    module = build_network(small(name, **options), data(3))
    with pytest.raises(ValueError, match=rf"size \(24, 24, 24\): the sides must be multiples of {divisor}"):
        module(torch.zeros(1, 2, 24, 24, 24))


@pytest.mark.parametrize(("name", "side"), [("sanet_v1", 16), ("sanet_v2", 32)])
def test_image_with_one_voxel_at_the_bottom_is_refused_in_training(name: str, side: int) -> None:
    """Normalising a single voxel gives zero whatever the image."""
    options = {"centre_norm": "group"} if name == "sanet_v1" else {}
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        build_network(small(name, **options), data())(torch.rand(2, 2, side, side))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("sanet_v1", {"nf": 10}, "nf is 10: it must be a multiple of 4"),
        ("sanet_v2", {"nf": 4}, "nf is 4: it must be a multiple of 4, at least 8"),
        ("sanet_v1", {"centre_norm": "layer"}, "centre_norm is 'layer'; allowed: batch, group"),
        ("sanet_v2", {"max_channels": 30}, "max_channels is 30: it must be a multiple of 4"),
        ("sanet_v2", {"thick_axis": 0}, "thick_axis 0 would be ignored: a 2D image has none"),
        ("sanet_v1", {"dropout": 1.5}, "dropout probability"),
    ],
)
def test_options_that_are_not_allowed_are_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"network {name} cannot be built .*{words}"):
        build_network(small(name, **options), data())


def test_thick_axis_beyond_the_image_is_refused() -> None:
    with pytest.raises(ConfigError, match="thick_axis is 3; allowed: 0, 1, 2"):
        build_network(small("sanet_v2", thick_axis=3), data(3))


def test_fingerprint_differs_by_every_option() -> None:
    networks = [
        *(NetworkConfig(name=name) for name in NAMES),
        *(small(name) for name in NAMES),
        *(small(name, deep_supervision=False) for name in NAMES),
        *(small(name, dropout=0.1) for name in NAMES),
        small("sanet_v1", centre_norm="group"),
        small("sanet_v2", max_channels=64),
        small("sanet_v2", thick_axis=2),
    ]
    assert len({fingerprint(network, data(3)) for network in networks}) == len(networks)
