"""The data contract: what two sites must agree on before weights may travel between them."""

from __future__ import annotations

import hashlib
import json

from gcml_ray.config import DataConfig


def data_contract(data: DataConfig) -> str:
    """A short hash over everything that gives a network's input and output channels their meaning.

    Covers the labels, regions and channels in their order (the order is the channel index), the voxel grid
    (target spacing or size), orientation, intensity normalisation and number of axes. Paths, splits, patches
    and augmentation may differ between sites.

    Returns:
        16 hexadecimal digits.
    """
    meaning = [
        list(data.labels.items()),
        None if data.regions is None else [[name, sorted(parts)] for name, parts in data.regions.items()],
        list(data.channels),
        data.target_spacing_mm or "unknown",
        data.resize,
        data.orientation if data.spatial_dims == 3 else None,
        data.normalise,
        data.spatial_dims,
    ]
    return hashlib.blake2b(json.dumps(meaning).encode(), digest_size=8).hexdigest()
