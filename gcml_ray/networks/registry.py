"""Networks by name. A new one is one function here (or in a file of its own) and one entry in ``BUILDERS``.

A builder takes (spatial_dims, in_channels, out_channels) and keyword-only options. Its signature is the only
place where options and their defaults are declared: configs are checked against it, and fingerprints are made
from it, without importing MONAI. So a network is the same whatever MONAI's own defaults become.

Legend: B batch, C output channels, *spatial = (H, W) or (D, H, W).
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import math
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gcml_ray.config import DataConfig, NetworkConfig
from gcml_ray.errors import ConfigError, told
from gcml_ray.networks.sanet import SaNetV1, SaNetV2

IntOrEach = int | tuple[int, ...]
Layer = str | tuple[str, dict[str, Any]]  # a name, or a name and its arguments, as MONAI takes them


def build_unet(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    *,
    channels: tuple[int, ...] = (16, 32, 64, 128),
    strides: tuple[IntOrEach, ...] = (2, 2, 2),
    kernel_size: IntOrEach = 3,
    up_kernel_size: IntOrEach = 3,
    num_res_units: int = 2,
    act: Layer = "PRELU",
    norm: Layer = "INSTANCE",
    dropout: float = 0.0,
    bias: bool = True,
    adn_ordering: str = "NDA",
) -> nn.Module:
    """MONAI's residual UNet (Kerfoot 2018). Sides must be multiples of the product of the strides."""
    from monai.networks.nets.unet import UNet  # noqa: PLC0415 - seconds to import, and fingerprints do without

    if len(strides) != len(channels) - 1:
        raise ValueError(f"strides has {len(strides)} numbers for {len(channels)} channels: it needs one fewer")
    network: nn.Module = UNet(
        spatial_dims=spatial_dims,
        in_channels=in_channels,
        out_channels=out_channels,
        channels=channels,
        strides=strides,  # type: ignore[arg-type]  # takes a tuple a level too, though it says int
        kernel_size=kernel_size,
        up_kernel_size=up_kernel_size,
        num_res_units=num_res_units,
        act=act,
        norm=norm,
        dropout=dropout,
        bias=bias,
        adn_ordering=adn_ordering,
    )
    return network


def build_dynunet(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    *,
    kernel_size: tuple[IntOrEach, ...] = (3, 3, 3, 3),
    strides: tuple[IntOrEach, ...] = (1, 2, 2, 2),
    filters: tuple[int, ...] | None = None,
    dropout: Layer | float | None = None,
    norm_name: Layer = ("INSTANCE", {"affine": True}),
    act_name: Layer = ("leakyrelu", {"inplace": True, "negative_slope": 0.01}),
    deep_supervision: bool = False,
    deep_supr_num: int = 1,
    res_block: bool = False,
    trans_bias: bool = False,
) -> nn.Module:
    """MONAI's nnU-Net (Isensee 2021), one kernel size and stride a level, the first stride 1.

    ``filters`` left out means nnU-Net's 32, 64, 128, ... (at most 320 in 3D, 512 in 2D). MONAI's
    ``upsample_kernel_size`` is not an option: it must equal ``strides[1:]``, and does.
    """
    from monai.networks.nets.dynunet import DynUNet  # noqa: PLC0415 - see build_unet

    if deep_supr_num != 1 and not deep_supervision:
        raise ValueError(f"deep_supr_num {deep_supr_num} would be ignored: deep_supervision is false")
    if filters is not None and len(filters) != len(strides):
        raise ValueError(f"filters has {len(filters)} numbers for {len(strides)} strides: it needs as many")
    network: nn.Module = DynUNet(
        spatial_dims=spatial_dims,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=kernel_size,
        strides=strides,
        upsample_kernel_size=strides[1:],
        filters=filters,
        dropout=dropout,
        norm_name=norm_name,
        act_name=act_name,
        deep_supervision=deep_supervision,
        deep_supr_num=deep_supr_num,
        res_block=res_block,
        trans_bias=trans_bias,
    )
    return network


def build_segresnet(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    *,
    init_filters: int = 16,
    blocks_down: tuple[int, ...] = (1, 2, 2, 4),
    blocks_up: tuple[int, ...] = (1, 1, 1),
    dropout_prob: float | None = None,
    act: Layer = ("RELU", {"inplace": True}),
    norm: Layer = ("GROUP", {"num_groups": 8}),
    use_conv_final: bool = True,
    upsample_mode: str = "nontrainable",
) -> nn.Module:
    """MONAI's SegResNet without its autoencoder (Myronenko 2018, arXiv 1810.11654)."""
    from monai.networks.nets.segresnet import SegResNet  # noqa: PLC0415 - see build_unet

    if len(blocks_up) != len(blocks_down) - 1:
        raise ValueError(f"blocks_up has {len(blocks_up)} numbers for {len(blocks_down)} blocks_down: one fewer")
    network: nn.Module = SegResNet(
        spatial_dims=spatial_dims,
        in_channels=in_channels,
        out_channels=out_channels,
        init_filters=init_filters,
        blocks_down=blocks_down,
        blocks_up=blocks_up,
        dropout_prob=dropout_prob,
        act=act,
        norm=norm,
        use_conv_final=use_conv_final,
        upsample_mode=upsample_mode,
    )
    return network


Builder = Callable[..., nn.Module]

BUILDERS: dict[str, Builder] = {
    "unet": build_unet,
    "dynunet": build_dynunet,
    "segresnet": build_segresnet,
    "sanet_v1": SaNetV1,  # our own: the constructor is the builder
    "sanet_v2": SaNetV2,
}


# --- building and running -----------------------------------------------------------------------


def build_network(network: NetworkConfig, data: DataConfig) -> nn.Module:
    """A freshly initialised network; weights come from torch's global generator, so seed it first.

    Args:
        network: name and options (lists become tuples).
        data: gives the spatial dimensions, input channels and outputs.

    Raises:
        ConfigError: unknown name or option, missing option, or what the network itself objects to.
    """
    builder, options = _builder(network.name), resolve_options(network)
    try:
        channels = {"in_channels": len(data.channels), "out_channels": data.num_outputs}
        return builder(spatial_dims=data.spatial_dims, **channels, **options)
    except Exception as error:  # constructors raise whatever they like; all of it stems from the options
        raise ConfigError(
            f"network {network.name} cannot be built with options {network.options or '{} (the defaults)'}, "
            f"{data.spatial_dims} spatial dimensions, {len(data.channels)} input channels and {data.num_outputs} "
            f"outputs: {type(error).__name__}: {error}"
        ) from error


def forward_heads(module: nn.Module, image: Tensor) -> list[Tensor]:
    """Run a network and give its heads as a list, main head first.

    Args:
        module: a network whose output is a tensor, a list or tuple of tensors, or DynUNet's stack of heads.
        image: (B, channels, *spatial).

    Returns:
        Logits (B, C, *spatial) a head; just one where the network has no deep supervision or is in eval mode.

    Raises:
        TypeError: where the output is anything else.
    """
    output = module(image)
    if isinstance(output, Tensor):
        is_stack = output.ndim == image.ndim + 1  # DynUNet: (B, heads, C, *spatial)
        return list(output.unbind(1)) if is_stack else [output]
    if isinstance(output, (list, tuple)) and output and all(isinstance(head, Tensor) for head in output):
        return list(output)
    raise TypeError(f"{type(module).__name__} returned {type(output).__name__}, expected a tensor or a list of tensors")


def fingerprint(network: NetworkConfig, data: DataConfig) -> str:
    """Sixteen hex digits that are equal for equal architectures, with defaults written out or not.

    Cheap: neither builds the network nor imports MONAI.

    Raises:
        ConfigError: unknown name or option, missing option.
    """
    identity = {
        "name": network.name,
        "options": _canonical(resolve_options(network)),
        "in_channels": len(data.channels),
        "num_outputs": data.num_outputs,
        "spatial_dims": data.spatial_dims,
    }
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _builder(name: str) -> Builder:
    if name not in BUILDERS:
        raise ConfigError(
            f"network.name is {name!r}{_suggestion(name, list(BUILDERS))}; allowed: {', '.join(BUILDERS)}"
        )
    return BUILDERS[name]


def resolve_options(network: NetworkConfig) -> dict[str, Any]:
    """Options with the defaults filled in; a dict, as its keys are the builder's own."""
    parameters = inspect.signature(_builder(network.name)).parameters.values()
    allowed = {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}
    problems = [
        f"unknown option {name!r}{_suggestion(name, list(allowed))}" for name in network.options if name not in allowed
    ]
    resolved = {**allowed, **{name: _tuples(value) for name, value in network.options.items()}}
    problems += [f"option {name!r} is required" for name, value in resolved.items() if value is inspect.Parameter.empty]
    if problems:
        raise ConfigError(
            f"network.options of {network.name}: {'; '.join(problems)}. Allowed: {', '.join(allowed)} "
            "(spatial_dims, in_channels and out_channels follow from the data section)"
        )
    return resolved


def _suggestion(word: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(word, allowed, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _tuples(value: Any) -> Any:
    """Lists as tuples, at every depth: MONAI tells ("GROUP", {...}) from a list."""
    if isinstance(value, (list, tuple)):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value


def _canonical(value: Any) -> Any:
    """The same value for 0 and 0.0, which a YAML author does not tell apart."""
    if isinstance(value, tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


# --- does the patch fit -------------------------------------------------------------------------


def check_sizes(
    network: NetworkConfig,
    data: DataConfig,
    *,
    window: tuple[int, ...] | None = None,
    device: torch.device | None = None,
) -> None:
    """Whether training batches of ``data.patch_size`` go through the network and come out at their own size.

    Args:
        network: its name and options.
        data: its patch size, channels and batch size.
        window: ``evaluation.window_size``, for which the same is asked.
        device: a first pass is made there. Without it all is done on torch's meta device, which takes milliseconds and
            no memory, but whose first use makes torch load its compiler: 70 MB and most of a second, too much for
            each site's process.

    Raises:
        ConfigError: names the key, the divisor of each axis, and the nearest size that fits.
    """
    sizes = {"data.patch_size": data.patch_size} | ({} if window is None else {"evaluation.window_size": window})
    if device is not None:
        with torch.random.fork_rng(devices=[]):  # the weights are drawn, and thrown away
            module = build_network(network, data).train().to(device)
            sizes = {key: size for key, size in sizes.items() if _misfit(module, data, size) is not None}
    for key, size in sizes.items():
        _check_size(network, data, size, key=key)


def _check_size(network: NetworkConfig, data: DataConfig, size: tuple[int, ...], *, key: str) -> None:
    """Tries a size, one number an axis, on the meta device; ``key``: where it stands in the configuration.

    Where it does not fit, the divisor that the network needs is found by the same means, so a new network needs no
    rule here.
    """
    try:
        with torch.device("meta"):
            module = build_network(network, data).train()
        problem = _misfit(module, data, size)
    except (ConfigError, NotImplementedError, RuntimeError) as error:
        if not _is_about_meta(error):
            raise
        with torch.random.fork_rng(devices=[]):  # values decide what it computes
            problem = _misfit(build_network(network, data).train(), data, size)
        if problem is not None:
            words = f"{key} {tuple(size)} does not fit network {network.name}: it said: {problem}"
            raise ConfigError(words) from error
        return
    if problem is None:
        return
    divisor = _find_divisor(module, data)
    advice = "no divisor up to 64 was found that the network accepts"
    if divisor is not None:
        fitting = next((each for each in _multiples(size, divisor) if not _misfit(module, data, each)), None)
        advice = f"every side must be a multiple of {divisor}" + (f"; {fitting} fits" if fitting else "")
    raise ConfigError(f"{key} {tuple(size)} does not fit network {network.name}: {advice} (it said: {problem})")


def _misfit(module: nn.Module, data: DataConfig, size: tuple[int, ...]) -> str | None:
    """What is wrong with a patch of this size, or None."""
    device = next(module.parameters()).device
    image = torch.zeros((data.batch_size, len(data.channels), *size), device=device)
    try:
        with torch.no_grad():
            main_head = forward_heads(module, image)[0]
    except (RuntimeError, ValueError, ZeroDivisionError, AssertionError) as error:
        if device.type == "meta" and _is_about_meta(error):
            raise
        return (str(error) or type(error).__name__).splitlines()[0]
    except Exception as error:  # whatever a network of one's own may raise; no other size would mend it
        words = told(str(error), type(error).__name__, traceback.format_exc())
        raise ConfigError(f"network {type(module).__name__} fails on a batch of zeros: {words}") from error
    if main_head.shape[1] != data.num_outputs:
        raise ConfigError(
            f"network {type(module).__name__} gives {main_head.shape[1]} output channels, the data section needs "
            f"{data.num_outputs} (labels, or regions)"
        )
    if main_head.shape[2:] != image.shape[2:]:
        return f"its output has size {tuple(main_head.shape[2:])}"
    return None


def _is_about_meta(error: Exception) -> bool:
    """Whether an operation needs values, which tensors on the meta device do not have."""
    return "meta" in str(error).lower()


def _find_divisor(module: nn.Module, data: DataConfig) -> tuple[int, ...] | None:
    """The smallest divisor of each axis, by trying out sizes."""

    def accepts(divisor: tuple[int, ...]) -> bool:
        # Two large primes: a size is a multiple of nothing else, and never too small.
        return all(_misfit(module, data, tuple(prime * each for each in divisor)) is None for prime in (67, 71))

    common = next((side for side in range(1, 65) if accepts((side,) * data.spatial_dims)), None)
    if common is None:
        return None
    divisor = [common] * data.spatial_dims
    for axis in range(data.spatial_dims):
        smaller = (side for side in range(1, common + 1) if common % side == 0)
        divisor[axis] = next(s for s in smaller if accepts((*divisor[:axis], s, *divisor[axis + 1 :])))
    return tuple(divisor)


def _multiples(size: tuple[int, ...], divisor: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The size rounded up to multiples of the divisor, then a few larger ones."""
    for extra in range(4):
        yield tuple((math.ceil(side / each) + extra) * each for side, each in zip(size, divisor, strict=True))
