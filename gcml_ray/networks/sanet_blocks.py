"""Building blocks of SA-Net: residual squeeze-excitation block and scale attention, in 2D and 3D.

Sources: squeeze and excitation, Hu 2018 (arXiv 1709.01507); scale attention, Yuan 2020 (BraTS 2020), whose
softmax across branches goes back to selective kernels, Li 2019 (arXiv 1903.06586).

Legend: B batch, C channels, S scales (4, finest first), *spatial = (H, W) or (D, H, W).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows it by
from torch import Tensor, nn

Sides = tuple[int, ...]  # one number an axis
MakeNorm = type[nn.Module]

CONV: dict[int, type[nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED_CONV: dict[int, type[nn.Module]] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORM: dict[int, MakeNorm] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM: dict[int, MakeNorm] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_MAX_POOL = {2: F.max_pool2d, 3: F.max_pool3d}
_INTERPOLATION = {2: "bilinear", 3: "trilinear"}


def conv(spatial_dims: int, in_channels: int, out_channels: int, kernel: Sides, *, stride: Sides) -> nn.Module:
    """A convolution without bias that keeps the size at stride 1: (B, in, *spatial) -> (B, out, *spatial / stride)."""
    padding = tuple(side // 2 for side in kernel)
    return CONV[spatial_dims](in_channels, out_channels, kernel, stride=stride, padding=padding, bias=False)


def norm(spatial_dims: int, channels: int, *, kind: str = "group") -> nn.Module:
    """Affine normalisation of (B, C, *spatial): ``group`` with one channel a group, or ``batch``.

    One channel a group is instance normalisation, so that class stands for it: unlike GroupNorm, it refuses in
    training a map of a single voxel, which normalisation would turn into zeros whatever the image.
    """
    kinds = {"group": INSTANCE_NORM, "batch": BATCH_NORM}
    if kind not in kinds:
        raise ValueError(f"norm {kind!r} is not known; allowed: {', '.join(kinds)}")
    return kinds[kind][spatial_dims](channels, affine=True)


def transposed_conv(spatial_dims: int, in_channels: int, out_channels: int, *, stride: Sides) -> nn.Module:
    """Upsampling by ``stride``, kernel equal to the stride, no bias: (B, in, *s) -> (B, out, *s x stride)."""
    return TRANSPOSED_CONV[spatial_dims](in_channels, out_channels, stride, stride=stride, bias=False)


def conv_unit(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    *,
    kernel: Sides,
    stride: Sides,
    activation: nn.Module,
) -> nn.Sequential:
    """Convolution, normalisation, activation: (B, in, *spatial) -> (B, out, *spatial / stride)."""
    return nn.Sequential(
        conv(spatial_dims, in_channels, out_channels, kernel, stride=stride),
        norm(spatial_dims, out_channels),
        activation,
    )


def total_stride(strides: Sequence[Sides], spatial_dims: int) -> Sides:
    """The step over several levels, axis by axis."""
    return tuple(math.prod(stride[axis] for stride in strides) for axis in range(spatial_dims))


def global_average(image: Tensor) -> Tensor:
    """(B, C, *spatial) -> (B, C)."""
    return image.flatten(2).mean(2)


def per_channel(weights: Tensor, image: Tensor) -> Tensor:
    """Weights (B, C) in a shape that multiplies ``image``, (B, C, *spatial)."""
    return weights.view(*weights.shape, *[1] * (image.ndim - 2))


class SqueezeExcitation(nn.Module):
    """Each channel times a gate in (0, 1) that is computed from the global averages of all. Hu 2018."""

    def __init__(self, channels: int, *, reduction: int = 4) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // reduction)
        self.excite = nn.Linear(channels // reduction, channels)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, *spatial) -> the same shape."""
        gates = torch.sigmoid(self.excite(F.relu(self.squeeze(global_average(image)))))
        return image * per_channel(gates, image)


class ResidualBlock(nn.Module):
    """Conv-norm-ReLU, conv-norm, squeeze and excitation, plus the shortcut, ReLU.

    The shortcut is the identity, or a 1x1 convolution of the block's stride where the shape changes.

    Args:
        norm_kind: see :func:`norm`.
        normalise_shortcut: whether the 1x1 convolution is followed by a normalisation.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        norm_kind: str = "group",
        normalise_shortcut: bool = False,
    ) -> None:
        super().__init__()
        one, three, strides = (1,) * spatial_dims, (3,) * spatial_dims, (stride,) * spatial_dims
        self.residual = nn.Sequential(
            conv(spatial_dims, in_channels, out_channels, three, stride=strides),
            norm(spatial_dims, out_channels, kind=norm_kind),
            nn.ReLU(inplace=True),
            conv(spatial_dims, out_channels, out_channels, three, stride=one),
            norm(spatial_dims, out_channels, kind=norm_kind),
            SqueezeExcitation(out_channels),
        )
        shortcut: list[nn.Module] = []
        if stride != 1 or in_channels != out_channels:
            shortcut.append(conv(spatial_dims, in_channels, out_channels, one, stride=strides))
            if normalise_shortcut:
                shortcut.append(norm(spatial_dims, out_channels, kind=norm_kind))
        self.shortcut = nn.Sequential(*shortcut)  # empty: the identity

    def forward(self, image: Tensor) -> Tensor:
        """(B, in, *spatial) -> (B, out, *spatial / stride)."""
        return F.relu(self.residual(image) + self.shortcut(image))


class ScaleAttention(nn.Module):
    """The encoder's maps of all scales, brought to one of them and mixed by channel-wise attention. Yuan 2020.

    A finer map is max-pooled, then conv-norm-activation; a coarser one takes conv-norm-activation, then
    (bi- or tri-)linear upsampling; the own map enters as it is. The sum's global average is squeezed to C/4, one
    excitation a scale gives logits, and their softmax across scales, channel by channel, weighs the maps.

    Args:
        channels: of the encoder's scales, finest first.
        strides: step from each scale to the next coarser one, ``len(channels) - 1`` of them.
        own: index of the scale that this block serves.
        activation: of the convolutions and of the squeeze; without state, so one module serves all.
        squeeze_norm: whether the squeezed vector is layer-normalised, and squeeze and excitation have a bias.
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: Sequence[int],
        strides: Sequence[Sides],
        *,
        own: int,
        activation: nn.Module,
        squeeze_norm: bool = False,
    ) -> None:
        super().__init__()
        one, three, width = (1,) * spatial_dims, (3,) * spatial_dims, channels[own]
        self.own, self.spatial_dims = own, spatial_dims
        self.pool_sides = [total_stride(strides[scale:own], spatial_dims) for scale in range(own)]
        self.align = nn.ModuleList(
            nn.Identity()
            if scale == own
            else conv_unit(spatial_dims, other, width, kernel=three, stride=one, activation=activation)
            for scale, other in enumerate(channels)
        )
        self.squeeze = nn.Sequential(
            nn.Linear(width, width // 4, bias=squeeze_norm),
            nn.LayerNorm(width // 4) if squeeze_norm else nn.Identity(),
            activation,
        )
        self.excite = nn.Linear(width // 4, len(channels) * width, bias=squeeze_norm)  # one excitation a scale

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """S maps (B, C_s, *spatial_s), finest first -> (B, C_own, *spatial_own)."""
        aligned = [self._align(scale, each, maps[self.own].shape[2:]) for scale, each in enumerate(maps)]
        descriptor = global_average(functools.reduce(torch.add, aligned))
        logits = self.excite(self.squeeze(descriptor))
        shares = logits.view(logits.shape[0], len(aligned), -1).softmax(1)  # (B, S, C)
        weighted = (per_channel(share, each) * each for share, each in zip(shares.unbind(1), aligned, strict=True))
        return functools.reduce(torch.add, weighted)

    def _align(self, scale: int, image: Tensor, size: torch.Size) -> Tensor:
        """One scale's map at the own scale's channels and size."""
        if scale < self.own:
            image = _MAX_POOL[self.spatial_dims](image, self.pool_sides[scale])
        image = self.align[scale](image)
        if scale > self.own:
            image = F.interpolate(image, size=size, mode=_INTERPOLATION[self.spatial_dims], align_corners=False)
        return image
