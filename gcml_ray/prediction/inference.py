"""From a network and a whole image to logits and labels, window by window.

Legend: C channels or classes, R regions, *spatial = D H W (3D) or H W (2D). No batch axis: one case a call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor, nn

from gcml_ray.config import Config
from gcml_ray.model.precision import Precision
from gcml_ray.networks.registry import forward_heads

Amp = Literal["none", "bf16", "fp16"]


def predict_logits(
    module: nn.Module,
    image: Tensor,
    *,
    patch_size: Sequence[int],
    overlap: float,
    window_batch: int,
    device: torch.device,
    amp: Amp,
) -> Tensor:
    """Logits of the main head for one image, with the module in eval mode for the time of the call.

    Windows overlap and are blended by a Gaussian that trusts their centre most (MONAI's
    ``sliding_window_inference``, mode ``gaussian``; the scheme of nnU-Net, Isensee et al. 2021). An image
    smaller than the patch is padded with zeros, and the padding is cut off again.

    Args:
        module: the network, on ``device``. Each of its modules gets its training flag back, also after an error.
        image: (C, *spatial), float, on any device.
        patch_size: voxels of a window, one number an axis.
        overlap: share of a window that the next one covers again, 0 <= overlap < 1.
        window_batch: windows a forward pass.
        device: where the windows run and the logits are put together.
        amp: precision of the forward passes; has no effect on a CPU. Blending is always float32.

    Returns:
        Logits (C, *spatial), float32, on ``device``; an inference tensor, so no gradient can start here.
    """
    precision = Precision(device.type, amp)

    def main_head(windows: Tensor) -> Tensor:
        with precision.autocast():
            logits = forward_heads(module, windows)[0]
        return logits.float()

    flags = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.inference_mode():
            logits = sliding_window_inference(
                image[None].float().to(device),
                roi_size=tuple(patch_size),
                sw_batch_size=window_batch,
                predictor=main_head,
                overlap=overlap,
                mode="gaussian",
            )
    finally:
        for part, training in flags.items():
            part.training = training
    assert isinstance(logits, Tensor)
    return logits[0]


def logits_by(
    config: Config, module: nn.Module, image: Tensor, device: torch.device, *, window_size: Sequence[int] | None = None
) -> Tensor:
    """:func:`predict_logits` as a configuration says; ``window_size`` in the place of its own."""
    return predict_logits(
        module,
        image,
        patch_size=window_size or config.window_size,
        overlap=config.evaluation.window_overlap,
        window_batch=config.evaluation.window_batch,
        device=device,
        amp=config.resources.amp,
    )


def to_probabilities(logits: Tensor, *, sigmoid: bool) -> Tensor:
    """Probabilities behind logits, both (C, *spatial): of regions (sigmoid) or of classes that exclude each other."""
    return logits.sigmoid() if sigmoid else logits.softmax(dim=0)


def mean_of(tensors: Iterable[Tensor]) -> Tensor:
    """Mean of tensors of one shape, at least one, of which no more than two are in memory at a time."""
    total: Tensor | None = None
    count = 0
    for tensor in tensors:
        total = tensor if total is None else total + tensor
        count += 1
    assert total is not None
    return total / count


def predict_labels(logits: Tensor, *, sigmoid: bool) -> Tensor:
    """The hard prediction behind logits (C, *spatial).

    Softmax: the class with the highest logit, (1, *spatial), int64; of equal ones the first. Sigmoid:
    a region where its probability exceeds 0.5, (R, *spatial), int64 of 0 and 1.
    """
    if sigmoid:
        return (logits > 0).long()
    return logits.max(dim=0, keepdim=True).indices  # argmax over this axis is ten times slower on a CPU
