"""Networks by name: shapes, heads, seeds, fingerprints, and errors that say what to change."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gcml_ray.config import DataConfig, NetworkConfig
from gcml_ray.errors import ConfigError
from gcml_ray.networks import registry
from gcml_ray.networks.registry import BUILDERS, build_network, check_sizes, fingerprint, forward_heads

# Small enough for a test; every name of the registry must be here.
SMALL: dict[str, dict[str, Any]] = {
    "unet": {"channels": [4, 8, 16], "strides": [2, 2]},
    "dynunet": {"filters": [4, 8, 16], "kernel_size": [3, 3, 3], "strides": [1, 2, 2]},
    "segresnet": {"init_filters": 8, "blocks_down": [1, 1, 1], "blocks_up": [1, 1]},
}


def data(spatial_dims: int = 2, **options: Any) -> DataConfig:
    """Two channels, three classes."""
    return DataConfig.model_validate(
        {
            "datalist": "cases.json",
            "channels": ["t1", "t2"],
            "labels": {"background": 0, "tumour": 1, "oedema": 2},
            "spatial_dims": spatial_dims,
            "spacing_is_real": True,
            "patch_size": (16,) * spatial_dims,
            **options,
        }
    )


def small(name: str, **options: Any) -> NetworkConfig:
    return NetworkConfig(name=name, options={**SMALL.get(name, {"nf": 8}), **options})


def test_every_network_is_tested() -> None:
    # SA-Net needs larger images than those here, and has tests of its own: test_sanet.py
    assert set(SMALL) | {"sanet_v1", "sanet_v2"} == set(BUILDERS)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("name", SMALL)
def test_network_maps_channels_to_outputs_at_the_size_of_the_image(name: str, spatial_dims: int) -> None:
    module = build_network(small(name), data(spatial_dims))
    heads = forward_heads(module, torch.zeros(2, 2, *(16,) * spatial_dims))
    assert [tuple(head.shape) for head in heads] == [(2, 3, *(16,) * spatial_dims)]


@pytest.mark.parametrize("name", SMALL)
def test_network_builds_without_options(name: str) -> None:
    check_sizes(NetworkConfig(name=name), data(3, patch_size=(32, 32, 32)))
    check_sizes(NetworkConfig(name=name), data(2, patch_size=(32, 32)))


def test_sigmoid_data_gives_one_output_a_region() -> None:
    regions = {"whole": ["tumour", "oedema"]}
    heads = forward_heads(build_network(small("unet"), data(regions=regions)), torch.zeros(1, 2, 16, 16))
    assert heads[0].shape[1] == 1


@pytest.mark.parametrize("name", BUILDERS)
def test_same_seed_gives_same_weights(name: str) -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(torch.cat([p.flatten() for p in build_network(small(name), data()).parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_options_reach_the_constructor_with_lists_as_tuples() -> None:
    """A normalisation as YAML writes it: a list of a name and its arguments."""
    module = build_network(small("unet", norm=["instance", {"affine": True}]), data())
    norms = [each for each in module.modules() if isinstance(each, nn.InstanceNorm2d)]
    assert norms
    assert all(each.affine for each in norms)


# --- heads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_deep_supervision_gives_heads_in_training_and_one_in_evaluation(spatial_dims: int) -> None:
    options = {"filters": [4, 8, 8, 8], "kernel_size": [3] * 4, "strides": [1, 2, 2, 2]}
    network = NetworkConfig(name="dynunet", options={**options, "deep_supervision": True, "deep_supr_num": 2})
    module, image = build_network(network, data(spatial_dims)), torch.rand(2, 2, *(16,) * spatial_dims)
    shape = (2, 3, *(16,) * spatial_dims)
    assert [tuple(head.shape) for head in forward_heads(module.train(), image)] == [shape] * 3
    assert [tuple(head.shape) for head in forward_heads(module.eval(), image)] == [shape]


def test_main_head_comes_first() -> None:
    """InstanceNorm keeps no statistics, so the main head in training equals the only head in evaluation."""
    network = small("dynunet", deep_supervision=True)
    module, image = build_network(network, data()), torch.rand(2, 2, 16, 16)
    torch.testing.assert_close(forward_heads(module.train(), image)[0], forward_heads(module.eval(), image)[0])


class Returns(nn.Module):
    """A network that returns what it is told to."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, image: Tensor) -> Any:  # noqa: ARG002 - a network takes an image
        return self.output


@pytest.mark.parametrize("kind", [list, tuple])
def test_list_or_tuple_of_heads_keeps_its_order(kind: type) -> None:
    main, other = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 4, 4)
    heads = forward_heads(Returns(kind([main, other])), torch.zeros(1, 2, 8, 8))
    assert heads[0] is main
    assert heads[1] is other


@pytest.mark.parametrize("output", [{"main": torch.zeros(1)}, [], [torch.zeros(1), "loss"]])
def test_output_of_another_kind_is_refused(output: Any) -> None:
    with pytest.raises(TypeError, match="Returns returned"):
        forward_heads(Returns(output), torch.zeros(1, 2, 8, 8))


# --- errors -------------------------------------------------------------------------------------


def test_unknown_network_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'unett' \(did you mean 'unet'\?\); allowed: unet, dynunet, segresnet"):
        build_network(NetworkConfig(name="unett"), data())


def test_all_unknown_options_are_named_at_once_with_a_suggestion() -> None:
    network = NetworkConfig(name="unet", options={"chanels": [4, 8], "colour": "red"})
    with pytest.raises(ConfigError, match=r"'chanels' \(did you mean 'channels'\?\); unknown option 'colour'.*Allowed"):
        build_network(network, data())


def test_channels_follow_from_the_data_and_are_no_option() -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'in_channels'.*follow from the data section"):
        build_network(small("unet", in_channels=3), data())


def test_missing_required_option_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def build_plain(spatial_dims: int, in_channels: int, out_channels: int, *, width: int) -> nn.Module:
        raise AssertionError(f"not reached with {spatial_dims}, {in_channels}, {out_channels}, {width}")

    monkeypatch.setitem(registry.BUILDERS, "plain", build_plain)
    with pytest.raises(ConfigError, match="option 'width' is required"):
        build_network(NetworkConfig(name="plain"), data())


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("unet", {"strides": [2, 2, 2]}, "strides has 3 numbers for 3 channels"),
        ("unet", {"norm": "no_such_norm"}, "no_such_norm"),
        ("dynunet", {"kernel_size": [3, 3]}, "length of kernel_size and strides"),
        ("dynunet", {"filters": [4, 8]}, "filters has 2 numbers for 3 strides"),
        ("dynunet", {"deep_supr_num": 2}, "deep_supr_num 2 would be ignored"),
        ("dynunet", {"deep_supervision": True, "deep_supr_num": 2}, "less than the number of up sample layers"),
        ("segresnet", {"blocks_up": [1]}, "blocks_up has 1 numbers for 3"),
        ("segresnet", {"init_filters": 6}, "divisible"),
    ],
)
def test_what_the_constructor_objects_to_is_told_with_the_options(
    name: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=f"network {name} cannot be built with options .*{words}"):
        build_network(small(name, **options), data())


# --- patch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("name", SMALL)
def test_patch_that_fits_passes(name: str, spatial_dims: int) -> None:
    check_sizes(small(name), data(spatial_dims))


@pytest.mark.parametrize("name", SMALL)
def test_patch_that_does_not_divide_is_refused_with_the_divisor(name: str) -> None:
    """Two strides of 2: multiples of 4."""
    words = r"data.patch_size \(16, 18, 16\) does not fit.*multiple of \(4, 4, 4\); \(16, 20, 16\) fits"
    with pytest.raises(ConfigError, match=words):
        check_sizes(small(name), data(3, patch_size=(16, 18, 16)))


def test_a_size_is_refused_in_the_same_words_where_it_was_tried_on_a_device() -> None:
    cpu = torch.device("cpu")
    check_sizes(small("unet"), data(), window=(8, 8), device=cpu)
    words = r"evaluation.window_size \(8, 6\) does not fit.*multiple of \(4, 4\); \(8, 8\) fits"
    with pytest.raises(ConfigError, match=words):
        check_sizes(small("unet"), data(), window=(8, 6), device=cpu)


def test_divisor_is_found_for_each_axis() -> None:
    """Strides (2, 2) and (2, 1): 4 and 2."""
    network = small("dynunet", strides=[1, [2, 2], [2, 1]])
    with pytest.raises(ConfigError, match=r"multiple of \(4, 2\); \(20, 18\) fits"):
        check_sizes(network, data(patch_size=(18, 18)))


def test_patch_that_divides_but_is_too_small_is_refused() -> None:
    """4 x 4 becomes one voxel at the bottom, which instance normalisation refuses in training."""
    with pytest.raises(ConfigError, match=r"multiple of \(4, 4\); \(8, 8\) fits.*more than 1 spatial element"):
        check_sizes(small("unet"), data(patch_size=(4, 4)))


def test_network_that_shrinks_the_image_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no divisor.*its output has size \(8, 8\)"):
        check_sizes(small("dynunet", strides=[2, 2, 2]), data(patch_size=(16, 16)))


def test_stride_of_zero_is_told_with_its_network() -> None:
    with pytest.raises(ConfigError, match=r"does not fit network unet: .*by zero"):
        check_sizes(small("unet", strides=[0, 2]), data())


class Odd(nn.Module):
    """A network of somebody's own; ``fault``: what its forward pass does."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, *, fault: str = "") -> None:
        super().__init__()
        del spatial_dims
        self.fault = fault
        self.layer = nn.Conv2d(in_channels, out_channels + (fault == "channels"), 1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits."""
        if self.fault == "typo":
            return self.layers(image)  # type: ignore[no-any-return,operator]
        scale = image.abs().max().item() if self.fault == "value" else 1.0
        logits: Tensor = self.layer(image / (1.0 + scale))
        return logits


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("typo", r"network Odd fails on a batch of zeros: .*'layers' \(AttributeError at test_networks.py:"),
        ("channels", "network Odd gives 4 output channels, the data section needs 3"),
    ],
)
def test_a_network_of_ones_own_that_is_wrong_is_told_what(
    monkeypatch: pytest.MonkeyPatch, fault: str, words: str
) -> None:
    monkeypatch.setitem(BUILDERS, "odd", Odd)
    with pytest.raises(ConfigError, match=words):
        check_sizes(NetworkConfig(name="odd", options={"fault": fault}), data())


def test_a_network_that_looks_at_values_is_tried_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILDERS, "odd", Odd)
    before = torch.get_rng_state()
    check_sizes(NetworkConfig(name="odd", options={"fault": "value"}), data())
    assert torch.equal(torch.get_rng_state(), before)


def test_checking_a_patch_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    check_sizes(small("unet"), data())
    assert torch.equal(torch.get_rng_state(), before)


# --- fingerprint --------------------------------------------------------------------------------


def test_fingerprint_is_the_same_with_defaults_written_out() -> None:
    written = NetworkConfig(name="unet", options={"channels": [16, 32, 64, 128], "dropout": 0, "norm": "INSTANCE"})
    assert fingerprint(NetworkConfig(name="unet"), data()) == fingerprint(written, data())


def test_fingerprint_does_not_depend_on_the_order_of_options() -> None:
    turned = NetworkConfig(name="unet", options=dict(reversed(SMALL["unet"].items())))
    assert fingerprint(small("unet"), data()) == fingerprint(turned, data())


def test_fingerprint_changes_with_name_options_channels_outputs_and_dimensions() -> None:
    regions = {"whole": ["tumour", "oedema"]}
    prints = {
        fingerprint(small("unet"), data()),
        fingerprint(NetworkConfig(name="unet"), data()),
        fingerprint(NetworkConfig(name="segresnet"), data()),
        fingerprint(small("unet"), data(3)),
        fingerprint(small("unet"), data(channels=["t1"])),
        fingerprint(small("unet"), data(regions=regions)),
    }
    assert len(prints) == 6


def test_fingerprint_refuses_unknown_options() -> None:
    with pytest.raises(ConfigError, match="unknown option 'depth'"):
        fingerprint(NetworkConfig(name="unet", options={"depth": 3}), data())


def test_importing_the_registry_does_not_import_monai() -> None:
    code = "import sys, gcml_ray.networks.registry; sys.exit('monai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603 - our own line


@pytest.mark.parametrize("name", SMALL)
def test_every_option_is_one_of_the_constructors(name: str) -> None:
    """So a reader of MONAI's documentation finds each option there, under the same name."""
    module = build_network(NetworkConfig(name=name), data())
    taken = set(inspect.signature(type(module).__init__).parameters)
    ours = {each.name for each in inspect.signature(BUILDERS[name]).parameters.values()}
    assert ours <= taken
