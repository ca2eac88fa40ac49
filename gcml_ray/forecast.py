"""What a run will need: memory, disk, traffic and time, worked out before it starts.

Arithmetic only. What cannot be known is measured in :mod:`gcml_ray.probe` and comes in as
:class:`SiteCosts`. The gossip graphs follow from the seed, so the traffic is exact as long as no site fails;
times hold for a machine that is as busy as it was when the costs were measured.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gcml_ray.config import Config, DataConfig, GcmlMethod, GmlMethod, GossipMethod, Method, OptimiserConfig
from gcml_ray.gossip import plan_round
from gcml_ray.preflight import Check, Machine, default_object_store_bytes, gigabytes
from gcml_ray.records import RoundPlan, Split

VALUE_BYTES = 4  # float32 everywhere
ROUND_FILES = 3  # two are kept, and the third is whole before the oldest goes
MODEL_FILES = 3  # the best models that the two kept rounds name, and the model before gossip
RAY_BYTES = 500_000_000  # GCS, raylet and agents of an idle Ray 2.60
CUDA_CONTEXT_BYTES = 600_000_000  # of each process that uses a GPU, before its first tensor
STORE_FACTOR = 2  # Ray frees objects in batches: about twice what is referenced lies there


@dataclass(frozen=True)
class SiteCases:
    """The cases of one site as their headers say: split and size on the training grid, (D, H, W) or (H, W)."""

    site: str
    grids: tuple[tuple[Split, tuple[int, ...]], ...]

    def count(self, split: Split) -> int:
        """Number of cases in a split."""
        return sum(part == split for part, _ in self.grids)

    def voxels(self, *splits: Split) -> int:
        """Voxels of all cases in these splits."""
        return sum(math.prod(shape) for part, shape in self.grids if part in splits)


@dataclass(frozen=True)
class SiteCosts:
    """What one site costs; see :func:`gcml_ray.probe.measure_site`.

    ``num_values`` are all weights (parameters and floating-point buffers), ``num_sent`` those of a push.
    ``activation_bytes``: what steps and predictions take beside weights, moments and data, on the device.
    ``window_s``: one sliding window of a prediction. ``load_s`` and ``score_s`` are for one voxel, the latter
    with all the metrics of a test.
    """

    site: str
    num_parameters: int
    num_values: int
    num_sent: int
    local_step_s: float
    mutual_step_s: float
    window_s: float
    load_s: float
    score_s: float
    checkpoint_s: float
    activation_bytes: int
    on_gpu: bool


@dataclass(frozen=True)
class Place:
    """Where the sites run: ``slots`` work at full speed at a time, ``sites_per_machine`` share a machine.

    ``interpreter_bytes``: a process with torch and MONAI imported, before any data.
    """

    slots: float
    sites_per_machine: int
    interpreter_bytes: int
    one_process: bool


@dataclass(frozen=True)
class SiteForecast:
    """One site's needs; ``host_bytes`` without the interpreter, ``disk_bytes`` at most."""

    site: str
    push_bytes: int
    cache_bytes: int
    host_bytes: int
    gpu_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class Forecast:
    """A run's needs.

    ``alone_round_s`` and ``exchange_round_s``: mean over the rounds without and with exchange, 0 where there are none.
    ``one_gpu_bytes``: what the sites that share a GPU take of it. ``pushed_bytes`` is the whole
    run's traffic, each push counted once; ``fedavg_upload_bytes`` what FedAvg would upload over as many rounds
    (it downloads as much again).
    """

    sites: tuple[SiteForecast, ...]
    num_rounds: int
    num_exchange_rounds: int
    num_pushes: int
    pushed_bytes: int
    fedavg_upload_bytes: int
    machine_memory_bytes: int
    one_gpu_bytes: int
    object_store_bytes: int
    disk_bytes: int
    alone_round_s: float
    exchange_round_s: float
    total_s: float

    def to_checks(self, machine: Machine) -> tuple[Check, ...]:
        """The forecast as lines of the report, compared with a machine."""
        return (
            self._memory_check(machine),
            *self._gpu_check(machine),
            *self._store_check(machine),
            self._traffic_check(),
            self._time_check(),
        )

    def _memory_check(self, machine: Machine) -> Check:
        largest = max(self.sites, key=lambda site: site.host_bytes)
        detail = (
            f"{gigabytes(self.machine_memory_bytes)} for the sites that share a machine (this one has "
            f"{gigabytes(machine.memory_bytes)}); the largest site is {largest.site} with "
            f"{gigabytes(largest.host_bytes)} beside its interpreter, {gigabytes(largest.cache_bytes)} of it cases"
        )
        share = self.machine_memory_bytes / machine.memory_bytes
        remedy = "spread the sites over more machines, resample the cases coarser, or take a smaller network"
        if share > 1:
            return Check("memory", "FAIL", detail, remedy)
        if share > 0.8:
            return Check("memory", "WARN", f"{detail} ({share:.0%})", remedy)
        return Check("memory", "PASS", detail)

    def _gpu_check(self, machine: Machine) -> Iterator[Check]:
        if not self.one_gpu_bytes or not machine.gpu_bytes:
            return
        smallest = min(machine.gpu_bytes)
        detail = f"up to {gigabytes(self.one_gpu_bytes)} on a GPU at a time, which has {gigabytes(smallest)}"
        if self.one_gpu_bytes > smallest:
            remedy = "raise resources.gpus_per_site, or lower data.batch_size, data.patch_size or the network's width"
            yield Check("gpu memory", "FAIL", detail, remedy)
        else:
            yield Check("gpu memory", "PASS", detail)

    def _store_check(self, machine: Machine) -> Iterator[Check]:
        if not self.object_store_bytes:
            return
        store = default_object_store_bytes(machine)
        detail = f"pushes need {gigabytes(self.object_store_bytes)} of the object store's {gigabytes(store)} here"
        if self.object_store_bytes <= store:
            yield Check("object store", "PASS", detail)
        else:
            remedy = "start Ray with a larger --object-store-memory, lower method.max_incoming, or use more machines"
            yield Check("object store", "WARN", detail, remedy)

    def _traffic_check(self) -> Check:
        if not self.num_pushes:
            return Check("traffic", "PASS", "no pushes")
        each = self.pushed_bytes / self.num_exchange_rounds
        share = self.pushed_bytes / self.fedavg_upload_bytes
        detail = (
            f"{self.num_pushes} pushes in {self.num_exchange_rounds} exchange rounds, {gigabytes(each)} a round, "
            f"{gigabytes(self.pushed_bytes)} in all: {share:.0%} of FedAvg's uploads over the same "
            f"{self.num_rounds} rounds, {share / 2:.0%} of its uploads and downloads"
        )
        return Check("traffic", "PASS", detail)

    def _time_check(self) -> Check:
        parts = [f"{self.alone_round_s:.1f} s a round without exchange"] if self.alone_round_s else []
        parts += [f"{self.exchange_round_s:.1f} s with"] if self.exchange_round_s else []
        detail = f"{', '.join(parts)}; {duration(self.total_s)} for {self.num_rounds} rounds, loading and test"
        return Check("time", "PASS", detail)


def duration(seconds: float) -> str:
    """Seconds in the unit a person would use."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def forecast(config: Config, cases: Sequence[SiteCases], costs: Sequence[SiteCosts], place: Place) -> Forecast:
    """The needs of a whole run.

    Args:
        config: the run's configuration.
        cases: every site's cases.
        costs: every site's costs, in the same order.
        place: where the sites run.
    """
    num_train = {site.site: site.count("train") for site in cases}
    plans = planned_rounds(config, num_train)
    sites = tuple(_site_forecast(config, one, cost) for one, cost in zip(cases, costs, strict=True))
    push_bytes = {site.site: site.push_bytes for site in sites}
    pushed = [push_bytes[edge.sender] for plan in plans for edge in plan.edges]
    gossips = isinstance(config.method, GossipMethod)
    exchange = [plan for plan in plans if gossips and plan.phase == "exchange"]
    times = {plan.round_number: round_seconds(config, plan, cases, costs, place.slots) for plan in plans}
    alone_s = [times[plan.round_number] for plan in plans if plan not in exchange]
    exchange_s = [times[plan.round_number] for plan in exchange]
    on_gpu = any(cost.on_gpu for cost in costs)
    sharing = max(1, int(1 / config.resources.gpus_per_site)) if on_gpu and not place.one_process else len(sites)
    by_gpu = sorted((site.gpu_bytes for site in sites), reverse=True)
    return Forecast(
        sites=sites,
        num_rounds=len(plans),
        num_exchange_rounds=len(exchange),
        num_pushes=len(pushed),
        pushed_bytes=sum(pushed),
        fedavg_upload_bytes=sum(push_bytes.values()) * len(plans),
        machine_memory_bytes=machine_memory_bytes(sites, costs, place),
        one_gpu_bytes=sum(by_gpu[:sharing]),
        object_store_bytes=object_store_bytes(config.method, sites, place),
        disk_bytes=sum(site.disk_bytes for site in sites),
        alone_round_s=_mean(alone_s),
        exchange_round_s=_mean(exchange_s),
        total_s=sum(times.values()) + _start_and_test_seconds(config, cases, costs, place.slots),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _site_forecast(config: Config, cases: SiteCases, costs: SiteCosts) -> SiteForecast:
    """One site's memory and disk."""
    moments = moments_per_parameter(config.optimiser) * costs.num_parameters * VALUE_BYTES
    weights = costs.num_values * VALUE_BYTES
    learners = learner_bytes(config, costs)
    push_bytes = costs.num_sent * VALUE_BYTES
    mailbox = push_bytes * config.method.max_incoming if isinstance(config.method, GossipMethod) else 0
    cache = cache_bytes(cases, config.data)
    device = learners + costs.activation_bytes + candidate_bytes(config.method, costs)
    writing = weights + moments  # safetensors copies every tensor before it writes
    host = cache + mailbox + (push_bytes + writing if costs.on_gpu else max(device, learners + writing))
    return SiteForecast(
        site=cases.site,
        push_bytes=push_bytes,
        cache_bytes=cache,
        host_bytes=host,
        gpu_bytes=device + CUDA_CONTEXT_BYTES if costs.on_gpu else 0,
        disk_bytes=ROUND_FILES * (weights + moments) + MODEL_FILES * weights,
    )


# --- memory and disk ---------------------------------------------------------------------------


def moments_per_parameter(optimiser: OptimiserConfig) -> int:
    """Values that an optimiser keeps for each parameter: Adam's two moments, a third with amsgrad."""
    if optimiser.name == "sgd":
        return 1 if optimiser.momentum else 0
    return 3 if optimiser.amsgrad else 2


def learner_bytes(config: Config, costs: SiteCosts) -> int:
    """Weights, gradient and moments of the local model and of one incoming model for each architecture.

    Other architectures than the site's own are counted as if they had its size.
    """
    networks = {network.model_dump_json() for network in (config.network, *config.site_networks.values())}
    plain = costs.num_values + costs.num_parameters
    moments = moments_per_parameter(config.optimiser) * costs.num_parameters
    steps = is_mutual(config.method)  # an incoming model that only waits for the test has no moments
    return VALUE_BYTES * (plain + moments + len(networks) * (plain + (moments if steps else 0)))


def candidate_bytes(method: Method, costs: SiteCosts) -> int:
    """Copies of the weights that a merge keeps side by side: before, after and mixed in ``select_best``."""
    is_best_of = isinstance(method, GcmlMethod) and method.merge == "select_best"
    return 3 * VALUE_BYTES * costs.num_values if is_best_of else 0


def cache_bytes(cases: SiteCases, data: DataConfig) -> int:
    """Memory of a site's cases: float32 images, labels, and for training a 4-byte index a voxel."""
    label_bytes = VALUE_BYTES * data.num_outputs if data.is_sigmoid else 1
    everything = cases.voxels("train", "validation", "test") * (VALUE_BYTES * len(data.channels) + label_bytes)
    return everything + VALUE_BYTES * cases.voxels("train")


def machine_memory_bytes(sites: Sequence[SiteForecast], costs: Sequence[SiteCosts], place: Place) -> int:
    """Memory of one machine: the largest sites that share it, each in a process of its own, and Ray itself.

    In one process the sites share the interpreter, and only one of them works at a time.
    """
    if place.one_process:
        on_host = [0 if cost.on_gpu else cost.activation_bytes for cost in costs]
        resting = sum(site.host_bytes - working for site, working in zip(sites, on_host, strict=True))
        return place.interpreter_bytes + resting + max(on_host)
    needs = sorted((place.interpreter_bytes + site.host_bytes for site in sites), reverse=True)
    return RAY_BYTES + sum(needs[: place.sites_per_machine])


def object_store_bytes(method: Method, sites: Sequence[SiteForecast], place: Place) -> int:
    """Shared memory for the pushes of one machine: each site's own and those in its mailbox, freed in batches."""
    if place.one_process or not isinstance(method, GossipMethod):
        return 0
    largest = sorted((site.push_bytes for site in sites), reverse=True)[: place.sites_per_machine]
    return STORE_FACTOR * (1 + method.max_incoming) * sum(largest)


# --- pushes and time ---------------------------------------------------------------------------


def planned_rounds(config: Config, num_train: dict[str, int]) -> tuple[RoundPlan, ...]:
    """Every round as the driver will plan it while no site is lost."""
    return tuple(
        plan_round(config.method, config.federation, round_number=number, num_train=num_train)
        for number in range(1, config.federation.rounds + 1)
    )


def is_mutual(method: Method) -> bool:
    """Whether a receiver trains the incoming model too."""
    return isinstance(method, GcmlMethod | GmlMethod)


def scoring_passes(method: Method, *, num_incoming: int, evaluates: bool) -> int:
    """How often a site predicts its validation cases in one round: for merges, and for the record."""
    merging, scores_kept_model = 0, False
    if isinstance(method, GcmlMethod) and num_incoming:
        merging += 2 if method.merge_first == "val_weighted" else 0
        merging += {"select_best": 4, "val_weighted": 2}.get(method.merge, 0)
        scores_kept_model = method.merge == "select_best"
    return merging * num_incoming + (evaluates and not scores_kept_model)


def num_windows(shape: Sequence[int], patch_size: Sequence[int], overlap: float) -> int:
    """Sliding windows over an image, as MONAI lays them: steps of ``patch x (1 - overlap)``, at least 1 voxel."""
    count = 1
    for length, patch in zip(shape, patch_size, strict=True):
        step = max(1, int(patch * (1 - overlap)))
        count *= 1 + math.ceil(max(0, length - patch) / step)
    return count


def site_round_seconds(
    config: Config, cases: SiteCases, costs: SiteCosts, *, num_incoming: int, round_number: int
) -> float:
    """One site's round: steps, scoring and checkpoint."""
    federation = config.federation
    is_last = round_number == federation.rounds
    evaluates = is_last or round_number == federation.num_warmup or round_number % federation.evaluate_every == 0
    step_s = costs.mutual_step_s if num_incoming and is_mutual(config.method) else costs.local_step_s
    passes = scoring_passes(config.method, num_incoming=num_incoming, evaluates=evaluates)
    writes = is_last or round_number % config.output.checkpoint_every == 0
    pass_s = costs.window_s * _windows(config, cases, "validation")
    return federation.local_steps * step_s + passes * pass_s + writes * costs.checkpoint_s


def _windows(config: Config, cases: SiteCases, split: Split) -> int:
    """Windows of one prediction of all cases of a split."""
    overlap = config.evaluation.window_overlap
    return sum(num_windows(shape, config.window_size, overlap) for part, shape in cases.grids if part == split)


def round_seconds(
    config: Config, plan: RoundPlan, cases: Sequence[SiteCases], costs: Sequence[SiteCosts], slots: float
) -> float:
    """One round of the federation: the sites share the slots, and the slowest one is waited for."""
    incoming = Counter(edge.receiver for edge in plan.edges)
    return _shared(
        [
            site_round_seconds(config, one, cost, num_incoming=incoming[one.site], round_number=plan.round_number)
            for one, cost in zip(cases, costs, strict=True)
        ],
        slots,
    )


def _shared(seconds: Sequence[float], slots: float) -> float:
    return max(*seconds, sum(seconds) / slots)


def _start_and_test_seconds(
    config: Config, cases: Sequence[SiteCases], costs: Sequence[SiteCosts], slots: float
) -> float:
    """Reading all cases, and the test of the personalised model and, after a warm-up, the one before gossip."""
    pairs = list(zip(cases, costs, strict=True))
    load = [cost.load_s * one.voxels("train", "validation", "test") for one, cost in pairs]
    test = [cost.window_s * _windows(config, one, "test") + cost.score_s * one.voxels("test") for one, cost in pairs]
    num_models = 2 if 0 < config.federation.num_warmup < config.federation.rounds else 1
    return _shared(load, slots) + num_models * _shared(test, slots)
