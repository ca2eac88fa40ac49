"""The pre-flight's look at networks and first steps: sizes that fit, what a case holds, losses that are finite.

Each function looks at one thing and gives its line of the report; none raises for what a user can mend.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from gcml_ray.config import Config, DataConfig, NetworkConfig
from gcml_ray.data.datalist import listed
from gcml_ray.data.site_data import SiteData
from gcml_ray.doctor.case_headers import CaseHeader
from gcml_ray.doctor.machine import Check
from gcml_ray.doctor.probe import Probe
from gcml_ray.errors import ConfigError
from gcml_ray.networks.registry import check_sizes


def check_patches(config: Config, headers: Sequence[CaseHeader]) -> Iterator[Check]:
    """Whether patches fit each network, and whether cases are at least as large as a patch."""
    patch = tuple(config.data.patch_size)
    for network in _networks(config):
        try:
            check_sizes(network, config.data, window=config.evaluation.window_size)
        except ConfigError as error:
            yield Check(f"network {network.name}", "FAIL", str(error), "change network.options or data.patch_size")
        else:
            yield Check(f"network {network.name}", "PASS", f"takes patches of {patch}")
    small = [
        f"site {header.case.site}, case {header.case.name}: {header.grid}"
        for header in headers
        if any(length < side for length, side in zip(header.grid, patch, strict=True))
    ]
    if small:
        detail = f"{len(small)} of {len(headers)} cases are smaller than a patch {patch} and get padded:{listed(small)}"
        yield Check("patch size", "WARN", detail, "lower data.patch_size, unless a margin of zeros is meant")
    elif headers:
        yield Check("patch size", "PASS", f"every case is at least {patch}")


def check_windows(config: Config, headers: Sequence[CaseHeader]) -> Iterator[Check]:
    """Whether prediction pads cases with more zeros than training showed, which normalisation by instance notices."""
    window, patch = config.window_size, tuple(config.data.patch_size)
    padded = sum(
        any(max(length, side) < wide for length, side, wide in zip(header.grid, patch, window, strict=True))
        for header in headers
    )
    if padded:
        detail = (
            f"evaluation.window_size {window} is larger than {padded} of {len(headers)} cases and than a training "
            f"patch {patch}: they are predicted with a margin of zeros that training never showed"
        )
        remedy = "leave evaluation.window_size out, so that windows are as large as patches, or try both on validation"
        yield Check("window size", "WARN", detail, remedy)


def _networks(config: Config) -> list[NetworkConfig]:
    """Every different network of the federation."""
    networks = [config.network]
    networks += [network for network in config.site_networks.values() if network not in networks]
    return networks


def check_sample(loaded: SiteData, data: DataConfig) -> Check:
    """What a case that was read whole holds."""
    sample = loaded.split("train")[0]
    shape = tuple(sample.image.shape)
    name, detail = f"read {loaded.site}", f"case {sample.case}: image {shape}, finite, label values known"
    empty = [
        label
        for index, label in enumerate(data.foreground_names)
        if not (sample.label[index].any() if data.is_sigmoid else (sample.label == index + 1).any())
    ]
    if len(empty) == len(data.foreground_names):
        remedy = "check that the label file belongs to this image, and data.labels"
        return Check(name, "WARN", f"{detail}, but no voxel is labelled {' or '.join(empty)}", remedy)
    return Check(name, "PASS", detail + (f"; no {' or '.join(empty)} in this one" if empty else ""))


def check_probe(probe: Probe, *, is_mutual: bool) -> Check:
    """Whether the losses of the dummy steps are finite, and what a step takes."""
    costs = probe.costs
    bad = [f"{name} {value}" for name, value in probe.losses.items() if not math.isfinite(value)]
    name = f"step {costs.site}"
    if bad:
        remedy = "lower optimiser.learning_rate, set optimiser.clip_norm, or set resources.amp to none"
        return Check(name, "FAIL", f"not finite after a few steps: {', '.join(bad)}", remedy)
    detail = f"loss {probe.losses['segmentation']:.3f}, {1000 * costs.local_step_s:.0f} ms a step"
    if is_mutual:
        mutual = probe.losses["mutual step: segmentation"]
        detail += f"; mutual: loss {mutual:.3f}, {1000 * costs.mutual_step_s:.0f} ms a step"
    return Check(name, "PASS", f"{detail}, on the {'GPU' if costs.on_gpu else 'CPU'}")
