"""The pre-flight of a configuration: its file, folder, tracker, cases, network and first steps.

Each function looks at one thing and gives its line of the report; none raises for what a user can mend.
Legend: D H W voxels.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sqlite3
import tempfile
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms.spatial.array import Orientation
from numpy.typing import NDArray

from gcml_ray.config import Config, DataConfig, NetworkConfig
from gcml_ray.config.data import AXIS_CODES
from gcml_ray.config.file import load_config
from gcml_ray.data.case_checks import check_headers
from gcml_ray.data.datalist import Case, check_files, listed
from gcml_ray.data.loading import respaced, with_affine
from gcml_ray.data.one_grid import on_one_grid, turned_header
from gcml_ray.data.problems import CaseProblem, grouped
from gcml_ray.data.reading import Header
from gcml_ray.data.site_data import SiteData
from gcml_ray.doctor.forecast_costs import SiteCases
from gcml_ray.doctor.machine import Check, nearest_existing
from gcml_ray.doctor.probe import Probe
from gcml_ray.errors import ConfigError, DataError
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.networks.registry import check_sizes
from gcml_ray.records import Split
from gcml_ray.tracking.client import tracking_uri
from gcml_ray.wording import in_shell, without_secrets

FEW_TRAIN = 3
REACH_TIMEOUT_S = 5.0
SPACING_TOLERANCE = 0.02  # relative: less than this is rounding in a header
MEND_DATA = "change the key that is named, or mend or leave out the files; then run the check again"


def read_config(path: str, overrides: Sequence[str]) -> tuple[Check, Config | None]:
    """The configuration, or why there is none."""
    if _is_datalist(path):
        remedy = f"name a configuration whose data.datalist is {path}, such as an edited copy of one in configs/"
        return Check("config", "FAIL", f"{path} is a datalist, not a configuration", remedy), None
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        remedy = f"change {path} (or the --set options) as it says"
        if not (Path(path).is_file() and os.access(path, os.R_OK)):
            remedy = "check the path; gcml-ray's own configurations lie in configs/, `ls configs` shows them"
        return Check("config", "FAIL", str(error), remedy), None
    return Check("config", "PASS", f"{path}: {config.name}, method {config.method.name}"), config


def _is_datalist(path: str) -> bool:
    """Whether a file looks like a datalist, with or without mistakes in it."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and not content.keys().isdisjoint(("cases", "training"))


# --- where results go --------------------------------------------------------------------------


def check_output_folder(config: Config) -> Check:
    """Whether the run folder can be made, and is not taken by another run."""
    name, path = "output folder", Path(config.output.folder)
    if RunFolder(path).is_taken:
        remedy = f"continue it with `gcml run --resume {in_shell(path)}`, or set another output.folder"
        return Check(name, "WARN", f"{path} already holds a run", remedy)
    parent = nearest_existing(path)
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        remedy = "set output.folder to a place where you may write"
        return Check(name, "FAIL", f"{path} cannot be made: {parent} is not writable ({error.strerror})", remedy)
    return Check(name, "PASS", f"{path} can be written")


def check_tracking(config: Config) -> Check:
    """Whether the tracking URI is one that MLflow takes, and is there; nothing is created."""
    if not config.tracking.enabled:
        return Check("tracking", "PASS", "off")
    try:
        uri = tracking_uri(config, Path(config.output.folder))
    except ConfigError as error:
        return Check("tracking", "FAIL", str(error), "set tracking.uri to a database or a server")
    problem = _tracking_problem(uri)
    if problem:
        remedy = "mend tracking.uri, start its server, or set tracking.enabled=false"
        return Check("tracking", "FAIL", f"{without_secrets(uri)}: {problem}", remedy)
    return Check("tracking", "PASS", without_secrets(uri))


def _tracking_problem(uri: str) -> str:
    """Why a store cannot be used, as far as can be told without MLflow; empty where nothing speaks against it."""
    if uri.startswith("sqlite:///"):
        return _sqlite_problem(Path(uri.removeprefix("sqlite:///")))
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return ""
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=REACH_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        return f"the server cannot be reached ({error})"
    return ""


def _sqlite_problem(path: Path) -> str:
    if not path.exists():
        parent = nearest_existing(path.parent)
        can_write = parent.is_dir() and os.access(parent, os.W_OK)
        return "" if can_write else f"the database cannot be made: {parent} is not a folder that can be written"
    try:
        connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
        try:
            connection.execute("SELECT name FROM sqlite_master LIMIT 1").fetchall()
        finally:
            connection.close()
    except sqlite3.Error as error:
        return f"not a database that can be read ({error})"
    return "" if os.access(path, os.W_OK) else "the database cannot be written"


# --- cases -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaseHeader:
    """A case whose headers are in order.

    ``grid`` is its size as it will be trained on, ``spacing_mm`` its stored voxel size (None where unreal),
    ``axes`` its stored orientation such as ``RAS`` (empty for pictures), ``displaced`` which of its
    files lie elsewhere than the first image, by their affine.
    """

    case: Case
    grid: tuple[int, ...]
    spacing_mm: tuple[float, ...] | None
    axes: str
    displaced: tuple[str, ...]


def check_split(site: str, cases: Sequence[Case]) -> Check:
    """Number of cases of each split; warns where training or choosing a model rests on almost nothing."""
    counts = {split: sum(case.split == split for case in cases) for split in ("train", "validation", "test")}
    detail = ", ".join(f"{count} {split}" for split, count in counts.items())
    few = []
    if counts["train"] < FEW_TRAIN:
        few.append(f"fewer than {FEW_TRAIN} training cases")
    if counts["validation"] == 1:
        few.append("a single validation case decides which model is kept")
    if few:
        remedy = "add cases, change `split` in the datalist or data.split, or leave the site out with federation.sites"
        return Check(f"cases {site}", "WARN", f"{detail}: {'; '.join(few)}", remedy)
    return Check(f"cases {site}", "PASS", detail)


def check_files_exist(cases: Sequence[Case]) -> Check:
    """Whether every image and label is there."""
    try:
        check_files(cases)
    except DataError as error:
        return Check("files", "FAIL", str(error), "copy the files there, or mend the paths in the datalist")
    num_files = sum(len(case.images) + 1 for case in cases)
    return Check("files", "PASS", f"all {num_files} files of {len(cases)} cases exist")


def check_all_headers(cases: Sequence[Case], data: DataConfig) -> tuple[Check, tuple[CaseHeader, ...]]:
    """Shapes, channels and affines of every case, and the cases that are in order."""
    problems: list[CaseProblem] = []
    headers: list[CaseHeader] = []
    for case in cases:
        own, wrong = check_headers(case, data)
        problems += [(case, problem) for problem in wrong]
        if not wrong:
            headers.append(_case_header(case, own, data))
    if problems:
        num_bad = len(cases) - len(headers)
        detail = f"{num_bad} of {len(cases)} cases are bad:{listed(grouped(problems, len(cases)))}"
        return Check("headers", "FAIL", detail, MEND_DATA), tuple(headers)
    detail = f"{len(cases)} cases with {len(data.channels)} channel(s), images and labels on one grid"
    return Check("headers", "PASS", detail), tuple(headers)


def _case_header(case: Case, headers: Sequence[Header], data: DataConfig) -> CaseHeader:
    files = (*case.images, case.label)
    first = headers[0].affine
    spacing, axes = None, ""
    if first is not None:
        axes = "".join(str(code) for code in nibabel.aff2axcodes(first))  # type: ignore[no-untyped-call]
        if data.spacing_is_real:
            affine = _oriented(headers[0].shape[1:], first, data).peek_pending_affine()
            spacing = tuple(float(size) for size in np.linalg.norm(affine[:3, :3], axis=0)[: data.spatial_dims])
    placed = zip(files, headers, strict=True)
    displaced = tuple(
        Path(file).name for file, header in placed if not on_one_grid(headers[0], turned_header(header, headers[0]))
    )
    return CaseHeader(case, training_grid(headers[0], data), spacing, axes, displaced)


def training_grid(header: Header, data: DataConfig) -> tuple[int, ...]:
    """The size, (D, H, W) or (H, W), that a case has after orientation and resampling.

    MONAI's transforms work it out lazily, on a tensor of a single value: no voxel is read or moved.
    """
    if data.resize is not None:
        return tuple(data.resize)
    shape = header.shape[1:]
    if header.affine is None:
        return shape
    grid = _oriented(shape, header.affine, data)
    if data.target_spacing_mm is not None:
        turned = torch.zeros(1).expand(1, *grid.peek_pending_shape())
        grid = respaced(MetaTensor(turned, affine=grid.peek_pending_affine()), data.target_spacing_mm, lazy=True)
    return tuple(int(length) for length in grid.peek_pending_shape())


def _oriented(shape: Sequence[int], affine: NDArray[np.float64], data: DataConfig) -> Any:
    """A tensor of a single value whose pending shape and affine are those of an image after orientation."""
    grid: Any = with_affine(torch.zeros(1).expand(1, *shape), affine)
    if data.spatial_dims == 3 and data.orientation is not None:
        grid = Orientation(axcodes=data.orientation, labels=AXIS_CODES, lazy=True)(grid)
    return grid


def check_voxel_sizes(headers: Sequence[CaseHeader], data: DataConfig) -> Check:
    """Whether all cases have one voxel size, or will be resampled to one."""
    name = "voxel size"
    if not data.spacing_is_real:
        return Check(name, "PASS", "not real by the configuration: nothing is resampled by it")
    if not headers:
        return Check(name, "PASS", "no case to look at")
    if data.target_spacing_mm is not None:
        return Check(name, "PASS", f"all cases are resampled to {_lengths(data.target_spacing_mm)}")
    ranges = {site: _spacing_range(own) for site, own in _by_site(headers).items()}
    mixed = [f"site {site}: {_lengths(low)} to {_lengths(high)}" for site, (low, high) in ranges.items() if low != high]
    low, high = _spacing_range([header for header in headers if header.spacing_mm is not None])
    if not mixed and low != high:
        mixed = [f"site {site}: {_lengths(size)}" for site, (size, _) in ranges.items()]
    if mixed:
        detail = f"cases differ in voxel size and are not resampled:{listed(mixed)}"
        remedy = "set data.target_spacing_mm, so that a voxel means the same in every case (or data.resize)"
        return Check(name, "WARN", detail, remedy)
    return Check(name, "PASS", f"{_lengths(low)} in every case")


def check_affines(headers: Sequence[CaseHeader], data: DataConfig) -> Check:
    """Whether images and labels lie in the same place, and all cases point the same way."""
    if not headers:
        return Check("affines", "WARN", "not checked: the headers of no case are in order", MEND_DATA)
    apart = [
        f"site {h.case.site}, case {h.case.name}: {', '.join(h.displaced)} not where {Path(h.case.images[0]).name} is"
        for h in headers
        if h.displaced
    ]
    if apart:
        detail = f"in {len(apart)} cases headers disagree on position; voxels are matched by index"
        remedy = "look at these files together in a viewer; resample what is shifted onto the first image's grid"
        return Check("affines", "WARN", f"{detail}:{listed(apart)}", remedy)
    axes = sorted({header.axes for header in headers if header.axes})
    if len(axes) > 1 and (data.spatial_dims == 2 or data.orientation is None):
        remedy = "set data.orientation: RAS" if data.spatial_dims == 3 else "export all images in one orientation"
        return Check("affines", "WARN", f"cases are stored as {', '.join(axes)} and will not be turned", remedy)
    if axes and data.spatial_dims == 3 and data.orientation is None:
        detail = (
            f"stored as {axes[0]} and not turned: an image on other axes would be segmented wrongly without a warning"
        )
        remedy = "set data.orientation: RAS, or store every image, also of new patients, on these axes"
        return Check("affines", "WARN", detail, remedy)
    turned = f", turned to {data.orientation}" if axes and data.spatial_dims == 3 and data.orientation else ""
    return Check("affines", "PASS", f"images and labels agree; stored as {', '.join(axes) or 'pictures'}{turned}")


def _by_site(headers: Iterable[CaseHeader]) -> dict[str, list[CaseHeader]]:
    sites: dict[str, list[CaseHeader]] = {}
    for header in headers:
        if header.spacing_mm is not None:
            sites.setdefault(header.case.site, []).append(header)
    return sites


def _spacing_range(headers: Sequence[CaseHeader]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Smallest and largest voxel size along each axis, equal where they differ by rounding only."""
    sizes = np.array([header.spacing_mm for header in headers])
    low, high = sizes.min(axis=0), sizes.max(axis=0)
    if np.all(high <= low * (1 + SPACING_TOLERANCE)):
        high = low
    return tuple(np.round(low, 3).tolist()), tuple(np.round(high, 3).tolist())


def _lengths(sizes: Sequence[float]) -> str:
    return " x ".join(f"{size:.3g}" for size in sizes) + " mm"


def site_cases(headers: Sequence[CaseHeader]) -> tuple[SiteCases, ...]:
    """The cases of every site in the form of the forecast, by the sites' names."""
    sites: dict[str, list[tuple[Split, tuple[int, ...]]]] = {}
    for header in headers:
        sites.setdefault(header.case.site, []).append((header.case.split or "train", header.grid))
    return tuple(SiteCases(site, tuple(grids)) for site, grids in sorted(sites.items()))


# --- network and steps -------------------------------------------------------------------------


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
