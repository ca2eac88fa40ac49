"""SA-Net, the scale attention network of the paper: v1 (BraTS 2020) and v2 (PanSeg, HECKTOR), in 2D and 3D.

Sources: Yuan, "Automatic Brain Tumor Segmentation with Scale Attention Network", BrainLes 2020 (arXiv 2011.03188),
and its successors for HECKTOR; Chen and Yuan (arXiv 2503.03883) train it by gossip. Written from a description
and checked by the published code's parameter counts, which are exact here:

======= ==== ============== ======= ==========
network nf   input channels outputs parameters
======= ==== ============== ======= ==========
v1, 3D  12   4              3       4,124,700
v1, 3D  24   4              3       16,484,544
v2, 3D  12   1              2       10,312,711
======= ==== ============== ======= ==========

What the description leaves open was inferred from these counts: of the readings tried that agree with it, those
below are the plainest that fit. The docstrings say so ("from the counts"), and say "our reading" where the counts
leave a choice. Only the counts were compared, never weights or outputs.

Legend: B batch, C output channels, nf channels of the finest level, *spatial = (H, W) or (D, H, W).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from gcml_ray.networks.sanet_blocks import (
    CONV,
    ResidualBlock,
    ScaleAttention,
    conv_unit,
    norm,
    total_stride,
    transposed_conv,
)

_NUM_SCALES = 4  # scales of attention, and heads
_V1_BLOCKS = (1, 2, 2, 2)  # residual blocks an encoder level, from the counts
_V2_LEVELS = 6


class SaNetV1(nn.Module):
    """SA-Net v1: residual squeeze-excitation encoder (nf, 2nf, 4nf, 8nf), centre (16nf), scale attention, 4 heads.

    From the counts: 1, 2, 2, 2 blocks in the encoder and one in the centre; the first block of a level has the
    stride; squeeze-excitation reduces by 4; 1x1 shortcuts; 3x3x3 convolutions in the attention and none for a
    scale's own map; transposed convolutions of kernel 2; heads and attention without biases.
    Our reading: the linear layers of squeeze-excitation have biases, the transposed convolutions are bare, and only
    the centre normalises its shortcut. (The same counts follow from normalised shortcuts everywhere, normalised
    transposed convolutions with biases, and squeeze-excitation without.) Also our reading: dropout acts on single
    voxels before a head's convolution, and heads stay at their own scale.

    Args:
        spatial_dims: 2 or 3.
        in_channels: of the image.
        out_channels: C, regions (sigmoid) or classes with background.
        nf: channels of the finest level, a multiple of 4.
        deep_supervision: four heads in training (published loss weights 0.4, 0.2, 0.2, 0.2), else only the main one.
        dropout: before each head.
        centre_norm: ``batch`` as in the published code (its statistics are buffers, which are sent or kept by
            ``method.buffers``), or ``group`` as everywhere else in the network.

    Raises:
        ValueError: ``nf`` or ``centre_norm`` is not allowed.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        nf: int = 12,
        deep_supervision: bool = True,
        dropout: float = 0.2,
        centre_norm: str = "batch",
    ) -> None:
        super().__init__()
        _check_width(nf, smallest=4)
        if centre_norm not in ("batch", "group"):
            raise ValueError(f"centre_norm is {centre_norm!r}; allowed: batch, group")
        channels = [nf * 2**level for level in range(_NUM_SCALES + 1)]
        two = (2,) * spatial_dims
        strides = [two] * _NUM_SCALES  # from each level to the next coarser one
        self.encoder = nn.ModuleList(
            _residual_level(spatial_dims, before, after, num_blocks=num_blocks, stride=1 if level == 0 else 2)
            for level, (before, after, num_blocks) in enumerate(
                zip([in_channels, *channels], channels, _V1_BLOCKS, strict=False)
            )
        )
        self.centre = ResidualBlock(
            spatial_dims, channels[-2], channels[-1], stride=2, norm_kind=centre_norm, normalise_shortcut=True
        )
        self.divisor = total_stride(strides, spatial_dims)
        # Decoder lists are ordered like the encoder, finest first, and run backwards.
        self.up = nn.ModuleList(
            transposed_conv(spatial_dims, coarse, fine, stride=two) for fine, coarse in itertools.pairwise(channels)
        )
        self.attention = _attention(spatial_dims, channels, strides, activation=nn.ReLU(), squeeze_norm=False)
        self.decoder = nn.ModuleList(ResidualBlock(spatial_dims, width, width) for width in channels[:-1])
        self.heads = _heads(
            spatial_dims, channels, out_channels, dropout=dropout, bias=False, deep_supervision=deep_supervision
        )

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Logits (B, C, *spatial); in training with deep supervision a list of 4, finest and main head first.

        The others have 1/2, 1/4 and 1/8 of the size.

        Args:
            image: (B, in_channels, *spatial), sides multiples of 16.

        Raises:
            ValueError: the sides are not.
        """
        maps = _encode(self.encoder, image, divisor=self.divisor)
        decoded, current = [], self.centre(maps[-1])
        for scale in reversed(range(_NUM_SCALES)):
            current = self.decoder[scale](self.up[scale](current) + self.attention[scale](maps))
            decoded.append(current)
        return _apply_heads(self, decoded[::-1])


class SaNetV2(nn.Module):
    """SA-Net v2: six levels of two conv-InstanceNorm-LeakyReLU, scale attention on the four finest, 4 heads.

    In 3D the first level is anisotropic: its encoder has kernels (1, 3, 3) and the step to the second level is
    (1, 2, 2), with the 1 on ``thick_axis``. In 2D that axis is absent: every kernel is 3, every step 2.

    From the counts: convolutions without bias; the decoder's first level has full kernels; transposed convolutions
    (kernel equal to the stride) with normalisation; 3x3x3 attention convolutions; heads on the four finest levels,
    with biases; a squeeze with bias and an affine normalisation, excitations with biases.
    Our reading: that normalisation is over the squeezed vector (LayerNorm: neither the batch nor a buffer matters),
    LeakyReLU with slope 0.01 everywhere, heads at their own scale.

    Args:
        spatial_dims: 2 or 3.
        in_channels: of the image.
        out_channels: C, classes with background (softmax) or regions.
        nf: channels of the finest level, a multiple of 4 and at least 8; doubled a level.
        max_channels: bound on a level's channels.
        deep_supervision: four heads in training (published loss weights 1, 1/2, 1/4, 1/8), else only the main one.
        dropout: before each head.
        thick_axis: the axis across thick slices, only in 3D; left out, the first one, as published. Images turned
            to RAS with axial slices have it last: 2.

    Raises:
        ValueError: ``nf`` or ``thick_axis`` is not allowed, or ``max_channels`` is not a multiple of 4 from ``nf`` on.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        nf: int = 12,
        max_channels: int = 320,
        deep_supervision: bool = True,
        dropout: float = 0.0,
        thick_axis: int | None = None,
    ) -> None:
        super().__init__()
        _check_width(nf, smallest=8)  # LayerNorm over a squeeze of nf / 4 = 1 would always give its bias
        if max_channels % 4 or max_channels < nf:
            raise ValueError(f"max_channels is {max_channels}: it must be a multiple of 4, at least nf {nf}")
        channels = [min(nf * 2**level, max_channels) for level in range(_V2_LEVELS)]
        one, two, three = (1,) * spatial_dims, (2,) * spatial_dims, (3,) * spatial_dims
        in_plane, in_plane_step = _in_plane(spatial_dims, thick_axis, 3), _in_plane(spatial_dims, thick_axis, 2)
        strides = [in_plane_step] + [two] * (_V2_LEVELS - 2)  # from each level to the next coarser one
        self.divisor = total_stride(strides, spatial_dims)
        self.encoder = nn.ModuleList(
            _plain_level(spatial_dims, before, after, kernel=in_plane if level == 0 else three, stride=stride)
            for level, (before, after, stride) in enumerate(
                zip([in_channels, *channels[:-1]], channels, [one, *strides], strict=True)
            )
        )
        self.up = nn.ModuleList(
            nn.Sequential(
                transposed_conv(spatial_dims, coarse, fine, stride=stride), norm(spatial_dims, fine), _leaky_relu()
            )
            for (fine, coarse), stride in zip(itertools.pairwise(channels), strides, strict=True)
        )
        self.attention = _attention(spatial_dims, channels, strides, activation=_leaky_relu(), squeeze_norm=True)
        self.decoder = nn.ModuleList(
            _plain_level(spatial_dims, width, width, kernel=three, stride=one) for width in channels[:-1]
        )
        self.heads = _heads(
            spatial_dims, channels, out_channels, dropout=dropout, bias=True, deep_supervision=deep_supervision
        )

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Logits (B, C, *spatial); in training with deep supervision a list of 4, finest and main head first.

        The others are smaller by 2, 4 and 8, along the thick axis by 1, 2 and 4.

        Args:
            image: (B, in_channels, *spatial), sides multiples of 32, along the thick axis of 16.

        Raises:
            ValueError: the sides are not.
        """
        maps = _encode(self.encoder, image, divisor=self.divisor)
        decoded, current = [], maps[-1]
        for level in reversed(range(_V2_LEVELS - 1)):
            attended = level < _NUM_SCALES
            skip = self.attention[level](maps[:_NUM_SCALES]) if attended else maps[level]
            current = self.decoder[level](self.up[level](current) + skip)
            if attended:
                decoded.append(current)
        return _apply_heads(self, decoded[::-1])


def _check_width(nf: int, *, smallest: int) -> None:
    if nf % 4 or nf < smallest:
        raise ValueError(f"nf is {nf}: it must be a multiple of 4, at least {smallest} (the attention squeezes by 4)")


def _in_plane(spatial_dims: int, thick_axis: int | None, side: int) -> tuple[int, ...]:
    """``side`` on every axis, but 1 on the thick one."""
    if spatial_dims == 2:
        if thick_axis is not None:
            raise ValueError(f"thick_axis {thick_axis} would be ignored: a 2D image has none, leave it out")
        return (side, side)
    if thick_axis not in (None, 0, 1, 2):
        raise ValueError(f"thick_axis is {thick_axis}; allowed: 0, 1, 2")
    return tuple(1 if axis == (thick_axis or 0) else side for axis in range(3))


def _leaky_relu() -> nn.Module:
    return nn.LeakyReLU(0.01, inplace=True)


def _residual_level(
    spatial_dims: int, in_channels: int, out_channels: int, *, num_blocks: int, stride: int
) -> nn.Sequential:
    """One level of v1's encoder; its first block changes channels and size."""
    first = ResidualBlock(spatial_dims, in_channels, out_channels, stride=stride)
    others = [ResidualBlock(spatial_dims, out_channels, out_channels) for _ in range(num_blocks - 1)]
    return nn.Sequential(first, *others)


def _plain_level(
    spatial_dims: int, in_channels: int, out_channels: int, *, kernel: tuple[int, ...], stride: tuple[int, ...]
) -> nn.Sequential:
    """Two units of v2; the first one changes channels and size."""
    one = (1,) * spatial_dims
    return nn.Sequential(
        conv_unit(spatial_dims, in_channels, out_channels, kernel=kernel, stride=stride, activation=_leaky_relu()),
        conv_unit(spatial_dims, out_channels, out_channels, kernel=kernel, stride=one, activation=_leaky_relu()),
    )


def _attention(
    spatial_dims: int,
    channels: Sequence[int],
    strides: Sequence[tuple[int, ...]],
    *,
    activation: nn.Module,
    squeeze_norm: bool,
) -> nn.ModuleList:
    """Scale attention for each of the finest scales, finest first."""
    channels, strides = channels[:_NUM_SCALES], strides[: _NUM_SCALES - 1]
    return nn.ModuleList(
        ScaleAttention(spatial_dims, channels, strides, own=own, activation=activation, squeeze_norm=squeeze_norm)
        for own in range(_NUM_SCALES)
    )


def _heads(
    spatial_dims: int,
    channels: Sequence[int],
    out_channels: int,
    *,
    dropout: float,
    bias: bool,
    deep_supervision: bool,
) -> nn.ModuleList:
    """Dropout and a 1x1 convolution on each of the finest levels, the finest (main) first."""
    widths = channels[: _NUM_SCALES if deep_supervision else 1]
    return nn.ModuleList(
        nn.Sequential(nn.Dropout(dropout), CONV[spatial_dims](width, out_channels, 1, bias=bias)) for width in widths
    )


def _encode(levels: nn.ModuleList, image: Tensor, *, divisor: tuple[int, ...]) -> list[Tensor]:
    """The maps of all levels, finest first."""
    if any(side % each for side, each in zip(image.shape[2:], divisor, strict=True)):
        # Else pooled and strided maps differ by a voxel somewhere in the decoder.
        raise ValueError(f"image of size {tuple(image.shape[2:])}: the sides must be multiples of {divisor}")
    maps = []
    for level in levels:
        image = level(image)
        maps.append(image)
    return maps


def _apply_heads(network: SaNetV1 | SaNetV2, decoded: Sequence[Tensor]) -> Tensor | list[Tensor]:
    """All heads in training, the main one alone in evaluation or without deep supervision."""
    if not network.training or len(network.heads) == 1:
        main: Tensor = network.heads[0](decoded[0])
        return main
    return [head(each) for head, each in zip(network.heads, decoded, strict=True)]
