"""Measures on this machine what one site will cost: a few real steps, a prediction, a checkpoint.

Nothing of it stays: the models are thrown away and the files go to a temporary folder.

Legend: B batch, C channels or classes, *spatial = D H W or H W, F weights of a model.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gcml_ray.config import Config, DcmlConfig, DefKtMethod, GcmlMethod, GmlMethod, ProxyFlMethod
from gcml_ray.data.datalist import Case
from gcml_ray.data.site_data import Batch, SiteData
from gcml_ray.doctor.forecast import moments_per_parameter
from gcml_ray.doctor.forecast_costs import SiteCosts
from gcml_ray.doctor.forecast_time import num_windows
from gcml_ray.losses.segmentation import build_segmentation_loss
from gcml_ray.methods.defkt import MUTUAL
from gcml_ray.methods.gml import REGIONAL
from gcml_ray.model.checkpoint import SiteState, save_round
from gcml_ray.model.learner import Learner, Statistics, local_step, mutual_step
from gcml_ray.prediction.metrics import score_case
from gcml_ray.seeding import derive_seed
from gcml_ray.stopwatch import memory_growth, resident_bytes
from gcml_ray.training.cpu import num_threads
from gcml_ray.training.evaluation import Evaluator
from gcml_ray.training.site_learner import build_learner

STEPS = 4  # at most, beside the first one, which also pays for set-up
BUDGET_S = 3.0  # no further step is begun after this
PREDICTED_WINDOWS = 2  # along each axis, at most


@dataclass(frozen=True)
class Probe:
    """What the probe of a site found: its costs, and the losses of its last steps (NaN shows trouble)."""

    costs: SiteCosts
    losses: dict[str, float]


def interpreter_bytes() -> int:
    """Memory of this process now: torch and MONAI are imported, nothing is loaded yet."""
    return resident_bytes()


@dataclass(frozen=True)
class Loading:
    """What reading one case has taken: seconds, and by how many bytes memory grew at its peak."""

    seconds: float
    num_bytes: int


def read_first_case(config: Config, case: Case) -> tuple[SiteData, Loading]:
    """One case of a site read whole, as its only training case, and what that took.

    Raises:
        DataError: what is wrong with its files.
    """
    here = config.data.model_copy(update={"num_workers": 0})  # the start of workers would count as a step's time
    data = SiteData(case.site, [replace(case, split="train")], here, seed=config.federation.seed)
    with _threads(num_threads(config.resources.cpus_per_site)), memory_growth() as grown:
        began = time.perf_counter()
        data.load(is_whole=False)
    return data, Loading(time.perf_counter() - began, grown[0])


def measure_site(config: Config, data: SiteData, *, loading: Loading, scratch: Path) -> Probe:
    """Real steps, a prediction and a checkpoint of one site, with its own network and patches.

    Args:
        config: the run's configuration.
        data: from :func:`read_first_case`.
        loading: from there too.
        scratch: a folder on the disk of the run; a temporary folder is made below it and removed.

    Raises:
        ConfigError: the network or the loss cannot be built.
        RuntimeError: a step fails, e.g. for want of GPU memory.
    """
    use_gpu = config.resources.gpus_per_site > 0 and torch.cuda.is_available()
    device = torch.device("cuda" if use_gpu else "cpu")
    with _threads(num_threads(config.resources.cpus_per_site)), torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.federation.seed, "probe", data.site))
        with _peak(device) as grown:
            local = _build_learner(config, data.site, device)
            local_s, losses = _measure_local(config, data, local, device)
            peer = _build_learner(config, data.site, device) if _dcml(config) else None
            mutual_s = local_s
            if peer is not None:
                mutual_s, more = _measure_mutual(config, data, local, peer, device)
                losses |= {f"mutual step: {name}": value for name, value in more.items()}
            window_s = _measure_window(config, data, local, device)
        score_s = _measure_scoring(config, data)
        checkpoint_s = _measure_checkpoint(config, data.site, local, scratch)
    num_voxels = math.prod(data.split("train")[0].image.shape[1:])
    known = 4 * sum(
        learner.model.flat.numel() + learner.model.num_parameters * (1 + moments_per_parameter(config.optimiser))
        for learner in (local, peer)
        if learner is not None
    )
    costs = SiteCosts(
        site=data.site,
        num_parameters=local.model.num_parameters,
        num_values=local.model.flat.numel(),
        num_sent=local.model.num_sent,
        local_step_s=local_s,
        mutual_step_s=mutual_s,
        window_s=window_s,
        load_s=loading.seconds / num_voxels,
        load_bytes=loading.num_bytes / num_voxels,
        score_s=score_s,
        checkpoint_s=checkpoint_s,
        activation_bytes=max(0, grown[0] - known),
        on_gpu=use_gpu,
    )
    return Probe(costs, losses)


# --- the parts ---------------------------------------------------------------------------------


def _build_learner(config: Config, site: str, device: torch.device) -> Learner:
    learner = build_learner(config, site, config.network_of(site), device)
    learner.model.module.train()
    return learner


def _dcml(config: Config) -> tuple[DcmlConfig, float] | None:
    """Divergence and full weight of the mutual steps; None for a method without."""
    if isinstance(config.method, GcmlMethod):
        return config.method.dcml, config.method.dcml.weight
    if isinstance(config.method, GmlMethod):
        return REGIONAL, config.method.weight
    if isinstance(config.method, DefKtMethod):
        return MUTUAL, config.method.weight
    return (MUTUAL, config.method.alpha) if isinstance(config.method, ProxyFlMethod) else None


def _measure_local(
    config: Config, data: SiteData, local: Learner, device: torch.device
) -> tuple[float, dict[str, float]]:
    loss = build_segmentation_loss(config.loss, config.data)
    return _measure_steps(data, device, lambda batch: local_step(local, batch, loss))


def _measure_mutual(
    config: Config, data: SiteData, local: Learner, peer: Learner, device: torch.device
) -> tuple[float, dict[str, float]]:
    loss = build_segmentation_loss(config.loss, config.data)
    terms = _dcml(config)
    assert terms is not None
    dcml, weight = terms

    def step(batch: Batch) -> Statistics:
        return mutual_step(local, peer, batch, loss, dcml=dcml, weight=weight, sigmoid=config.data.is_sigmoid)

    return _measure_steps(data, device, step)


def _measure_steps(
    data: SiteData, device: torch.device, step: Callable[[Batch], Statistics]
) -> tuple[float, dict[str, float]]:
    """Mean seconds of a step with its batch, and the statistics of the last one.

    The mean and not the least: the run will be disturbed as much. The first step is left out, unless it
    takes the whole budget.
    """
    batches = data.batches(1, STEPS + 1)
    seconds: list[float] = []
    statistics: Statistics = {}
    while len(seconds) <= STEPS and (sum(seconds) < BUDGET_S or not seconds):
        began = time.perf_counter()
        statistics = step(next(batches).to(device))
        _finish(device)
        seconds.append(time.perf_counter() - began)
    counted = seconds[1:] or seconds
    return sum(counted) / len(counted), {name: float(value) for name, value in statistics.items()}


def _finish(device: torch.device) -> None:
    """Waits for the GPU, whose work goes on after a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _measure_window(config: Config, data: SiteData, learner: Learner, device: torch.device) -> float:
    """Seconds of one window of a prediction, over a corner of the image that holds a few of them."""
    image = data.split("train")[0].image
    overlap = config.evaluation.window_overlap
    corner = [
        min(length, patch + (PREDICTED_WINDOWS - 1) * max(1, int(patch * (1 - overlap))))
        for length, patch in zip(image.shape[1:], config.window_size, strict=True)
    ]
    part = image[(slice(None), *(slice(length) for length in corner))]
    evaluator = Evaluator(config, data.site, data, device)
    seconds = []
    for _ in range(2):  # the first one also makes the map of weights and warms up
        began = time.perf_counter()
        evaluator.predict(learner, part)
        seconds.append(time.perf_counter() - began)
        if seconds[0] > BUDGET_S:
            break
    return seconds[-1] / num_windows(corner, config.window_size, overlap)


def _measure_checkpoint(config: Config, site: str, learner: Learner, scratch: Path) -> float:
    state = SiteState(site=site, round_number=1, identity=config.identity)
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".gcml-doctor-") as folder:
        began = time.perf_counter()
        save_round(Path(folder), learner, state)
        return time.perf_counter() - began


def _measure_scoring(config: Config, data: SiteData) -> float:
    """Seconds a voxel of all metrics of a test, for a prediction that is its own reference."""
    sample = data.split("train")[0]
    began = time.perf_counter()
    score_case(
        sample.label.long(),
        sample.label,
        spacing=sample.spacing,
        tolerance=config.evaluation.surface_tolerance,
        class_names=config.data.foreground_names,
        sigmoid=config.data.is_sigmoid,
        site=data.site,
        case=sample.case,
        split="test",
        model="probe",
    )
    return (time.perf_counter() - began) / math.prod(sample.image.shape[1:])


# --- threads and memory ------------------------------------------------------------------------


@contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    """As many threads as a site will have, for the length of a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _peak(device: torch.device) -> Iterator[list[int]]:
    """Yields a list that holds one number after the block: by how many bytes memory grew at its peak.

    The device's memory on a GPU; on a CPU see :func:`gcml_ray.stopwatch.memory_growth`.
    """
    if device.type != "cuda":
        with memory_growth() as grown:
            yield grown
        return
    grown = []
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield grown
    grown.append(torch.cuda.max_memory_reserved(device) - before)
