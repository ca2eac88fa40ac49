"""What a run will need: memory, disk, traffic and time, worked out before it starts.

Arithmetic only. What cannot be known is measured in :mod:`gcml_ray.doctor.probe` and comes in as
:class:`SiteCosts`. The gossip graphs follow from the seed, so the traffic is exact as long as no site fails, no push
is refused, and ``federation.time_limit_s`` ends nothing early; times hold for a machine that is as busy as it was when
the costs were measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gcml_ray.config import (
    POOLED,
    SERVER,
    Config,
    DataConfig,
    GcmlMethod,
    Method,
    OptimiserConfig,
    PooledMethod,
    has_peers,
    has_server,
    has_two_models,
    takes_mutual_steps,
)
from gcml_ray.doctor.forecast_costs import Place, SiteCases, SiteCosts
from gcml_ray.doctor.forecast_time import planned_rounds, round_seconds, start_and_test_seconds
from gcml_ray.doctor.machine import Check, Machine, default_object_store_bytes, gigabytes
from gcml_ray.files.run_folder import KEPT_ROUNDS
from gcml_ray.push.payload import push_bytes
from gcml_ray.records import Edge, RoundPlan
from gcml_ray.wording import duration

VALUE_BYTES = 4  # float32 everywhere
ROUND_FILES = KEPT_ROUNDS + 1  # the newest is whole before the oldest goes
MODEL_FILES = KEPT_ROUNDS + 1  # the best models that the kept rounds name, and the model before gossip
RAY_BYTES = 500_000_000  # GCS, raylet and agents of an idle Ray 2.60
CUDA_CONTEXT_BYTES = 600_000_000  # of each process that uses a GPU, before its first tensor
SCORE_BYTES = 40  # a voxel, for the surface distances of a model that finds structure all over (benchmarks.large)
STORE_FACTOR = 2  # Ray frees objects in batches: about twice what is referenced lies there


@dataclass(frozen=True)
class SiteForecast:
    """One site's needs; ``host_bytes`` without the interpreter, ``disk_bytes`` at most.

    ``push_bytes``: a push as it travels; with ``topk`` the first one to each receiver has ``first_push_bytes``.
    ``vector_bytes``: what it is in memory, before and after. ``resting_bytes``: of ``host_bytes``, what it keeps while
    another site of the same process works. ``waiting_bytes``: the same where sites take turns at one set of learners.
    """

    site: str
    push_bytes: int
    first_push_bytes: int
    vector_bytes: int
    cache_bytes: int
    host_bytes: int
    gpu_bytes: int
    disk_bytes: int
    resting_bytes: int = 0
    waiting_bytes: int = 0


@dataclass(frozen=True)
class Forecast:
    """A run's needs.

    ``alone_round_s`` and ``exchange_round_s``: mean over the rounds without and with exchange, 0 where there are none.
    ``one_gpu_bytes``: what the sites that share a GPU take of it. ``pushed_bytes`` is the whole
    run's traffic, each push counted once; ``fedavg_upload_bytes`` what FedAvg would upload in as many exchange
    rounds (it downloads as much again).
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
            f"{gigabytes(self.pushed_bytes)} in all: {share:.0%} of FedAvg's uploads in the same "
            f"rounds, {share / 2:.0%} of its uploads and downloads"
        )
        return Check("traffic", "PASS", detail)

    def _time_check(self) -> Check:
        parts = [f"{self.alone_round_s:.1f} s a round without exchange"] if self.alone_round_s else []
        parts += [f"{self.exchange_round_s:.1f} s with"] if self.exchange_round_s else []
        detail = f"{', '.join(parts)}; {duration(self.total_s)} for {self.num_rounds} rounds, loading and test"
        return Check("time", "PASS", detail)


def forecast(config: Config, cases: Sequence[SiteCases], costs: Sequence[SiteCosts], place: Place) -> Forecast:
    """The needs of a whole run.

    Args:
        config: the run's configuration.
        cases: every site's cases.
        costs: every site's costs, in the same order.
        place: where the sites run.
    """
    if isinstance(config.method, PooledMethod):
        cases, costs = pooled(cases, costs)
    num_train = {site.site: site.count("train") for site in cases}
    plans = planned_rounds(config, num_train)
    sites = tuple(_site_forecast(config, one, cost) for one, cost in zip(cases, costs, strict=True))
    pushed = _pushed(plans, sites)
    exchanges = has_peers(config.method) or has_server(config.method)
    exchange = [plan for plan in plans if exchanges and plan.phase == "exchange"]
    times = {plan.round_number: round_seconds(config, plan, cases, costs, place.slots) for plan in plans}
    alone_s = [times[plan.round_number] for plan in plans if plan not in exchange]
    exchange_s = [times[plan.round_number] for plan in exchange]
    on_gpu = any(cost.on_gpu for cost in costs)
    sharing = max(1, int(1 / config.resources.gpus_per_site)) if on_gpu and not place.one_process else len(sites)
    sharing = min(sharing, config.resources.num_actors(len(sites)))  # sites of one process take turns
    by_gpu = sorted((site.gpu_bytes for site in sites), reverse=True)
    return Forecast(
        sites=sites,
        num_rounds=len(plans),
        num_exchange_rounds=len(exchange),
        num_pushes=len(pushed),
        pushed_bytes=sum(pushed),
        fedavg_upload_bytes=sum(site.push_bytes for site in sites) * len(exchange),
        machine_memory_bytes=machine_memory_bytes(sites, place)
        + server_bytes(config.method, sites, place)
        + worker_bytes(config.data, len(sites), place),
        one_gpu_bytes=sum(by_gpu[:sharing]),
        object_store_bytes=object_store_bytes(config.method, sites, place),
        disk_bytes=sum(site.disk_bytes for site in sites),
        alone_round_s=_mean(alone_s),
        exchange_round_s=_mean(exchange_s),
        total_s=sum(times.values()) + start_and_test_seconds(config, cases, costs, place.slots),
    )


def pooled(cases: Sequence[SiteCases], costs: Sequence[SiteCosts]) -> tuple[list[SiteCases], list[SiteCosts]]:
    """All cases as those of one site, with the costs of the most expensive one."""
    together = SiteCases(POOLED, tuple(grid for site in cases for grid in site.grids))
    return [together], [replace(max(costs, key=lambda cost: cost.local_step_s), site=POOLED)]


def _pushed(plans: Sequence[RoundPlan], sites: Sequence[SiteForecast]) -> list[int]:
    """Bytes of every push of the run."""
    senders = {site.site: site for site in sites} | {SERVER: sites[0]}
    first: dict[Edge, int] = {}
    for plan in plans:
        for edge in plan.edges:
            first.setdefault(edge, plan.round_number)
    return [
        senders[edge.sender].first_push_bytes if first[edge] == plan.round_number else senders[edge.sender].push_bytes
        for plan in plans
        for edge in plan.edges
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _site_forecast(config: Config, cases: SiteCases, costs: SiteCosts) -> SiteForecast:
    """One site's memory and disk."""
    moments = moments_per_parameter(config.optimiser) * costs.num_parameters * VALUE_BYTES
    weights = costs.num_values * VALUE_BYTES
    average = weights * num_averages(config)
    # Kept rounds' files, and the lasting names.
    num_peer_models = (KEPT_ROUNDS + 1) * config.evaluation.ensemble_peers
    learners = learner_bytes(config, costs)
    vector = costs.num_sent * VALUE_BYTES
    travelling = push_bytes(config.wire, costs.num_sent, num_exact=max(0, costs.num_sent - costs.num_parameters))
    mailbox = vector * config.method.max_incoming
    cache = cache_bytes(cases, config.data)
    device = learners + costs.activation_bytes + candidate_bytes(config.method, costs) * (2 if average else 1)
    own = (weights + moments) * (2 if has_two_models(config.method) else 1) + average
    written = vector + own if costs.on_gpu else learners + own  # safetensors copies every tensor before it writes
    passing = own if costs.on_gpu else costs.activation_bytes  # needed while it trains or writes, and then no more
    resting = cache + mailbox + (written if costs.on_gpu else max(device, written)) - passing
    score_bytes = SCORE_BYTES + 2 * VALUE_BYTES * config.data.num_outputs  # logits, and what they are summed up in
    testing = score_bytes * cases.largest("validation", "test")
    loading = int(costs.load_bytes * cases.largest("train", "validation", "test"))
    return SiteForecast(
        site=cases.site,
        push_bytes=travelling,
        first_push_bytes=vector if config.wire.topk_share else travelling,
        vector_bytes=vector,
        cache_bytes=cache,
        host_bytes=max(resting + max(passing, testing), cache + loading),
        gpu_bytes=device + CUDA_CONTEXT_BYTES if costs.on_gpu else 0,
        disk_bytes=ROUND_FILES * own + (MODEL_FILES + num_peer_models) * weights,
        resting_bytes=resting,
        waiting_bytes=mailbox + (0 if config.resources.park == "disk" else cache + own),
    )


# --- memory and disk ---------------------------------------------------------------------------


def moments_per_parameter(optimiser: OptimiserConfig) -> int:
    """Values that an optimiser keeps for each parameter: Adam's two moments, a third with amsgrad."""
    if optimiser.name == "sgd":
        return 1 if optimiser.momentum else 0
    return 3 if optimiser.amsgrad else 2


def learner_bytes(config: Config, costs: SiteCosts) -> int:
    """Weights, gradient, moments and averages of a site's own model or two; one incoming model for each network.

    Other architectures than the site's own are counted as if they had its size.
    """
    networks = {network.model_dump_json() for network in (config.network, *config.site_networks.values())}
    plain = costs.num_values + costs.num_parameters
    moments = moments_per_parameter(config.optimiser) * costs.num_parameters
    steps = takes_mutual_steps(config.method)  # an incoming model that only waits for the test has no moments
    num_own = 2 if has_two_models(config.method) else 1
    averages = costs.num_values * num_averages(config)
    return VALUE_BYTES * (averages + num_own * (plain + moments) + len(networks) * (plain + (moments if steps else 0)))


def num_averages(config: Config) -> int:
    """How many weight averages a site keeps: of its own model, and of a second model whose average is pushed."""
    if config.optimiser.weight_average == 0:
        return 0
    return 2 if config.optimiser.push_average and has_two_models(config.method) else 1


def candidate_bytes(method: Method, costs: SiteCosts) -> int:
    """Copies of the weights that a merge keeps side by side: before, after and mixed in ``select_best``."""
    is_best_of = isinstance(method, GcmlMethod) and method.merge == "select_best"
    return 3 * VALUE_BYTES * costs.num_values if is_best_of else 0


def cache_bytes(cases: SiteCases, data: DataConfig) -> int:
    """Memory of a site's cases: float32 images, labels, and for training a 4-byte index a voxel."""
    label_bytes = VALUE_BYTES * data.num_outputs if data.is_sigmoid else 1
    everything = cases.voxels("train", "validation", "test") * (VALUE_BYTES * len(data.channels) + label_bytes)
    return everything + VALUE_BYTES * cases.voxels("train")


def machine_memory_bytes(sites: Sequence[SiteForecast], place: Place) -> int:
    """Memory of one machine: the largest sites that share it, each in a process of its own, and Ray itself.

    In one process the sites share the interpreter, and only one of them works at a time.
    """
    if place.sites_per_process > 1:
        return _shared_processes_bytes(sites, place)
    if place.one_process:
        resting = sum(site.resting_bytes for site in sites)
        return place.interpreter_bytes + resting + max(site.host_bytes - site.resting_bytes for site in sites)
    needs = sorted((place.interpreter_bytes + site.host_bytes for site in sites), reverse=True)
    return RAY_BYTES + sum(needs[: place.sites_per_machine])


def _shared_processes_bytes(sites: Sequence[SiteForecast], place: Place) -> int:
    """Memory of one machine whose sites share processes: all of them wait there, and one of each process works."""
    largest = sorted(sites, key=lambda site: site.host_bytes, reverse=True)[: place.sites_per_machine]
    num_processes = -(-len(largest) // place.sites_per_process)
    working = sorted((max(0, site.host_bytes - site.waiting_bytes) for site in largest), reverse=True)
    interpreters = place.interpreter_bytes * (1 if place.one_process else num_processes)
    base = interpreters + (0 if place.one_process else RAY_BYTES)
    return base + sum(site.waiting_bytes for site in largest) + sum(working[:num_processes])


def worker_bytes(data: DataConfig, num_sites: int, place: Place) -> int:
    """Memory of the processes beside the sites of one machine that cut patches; they share the sites' cases."""
    return data.num_workers * min(num_sites, place.sites_per_machine) * place.interpreter_bytes


def server_bytes(method: Method, sites: Sequence[SiteForecast], place: Place) -> int:
    """Memory of a server, counted on the fullest machine: every site's push, the mean, and one product on the way."""
    if not has_server(method):
        return 0
    return (0 if place.one_process else place.interpreter_bytes) + (len(sites) + 2) * sites[0].vector_bytes


def object_store_bytes(method: Method, sites: Sequence[SiteForecast], place: Place) -> int:
    """Shared memory for the pushes of one machine: each site's own and those in its mailbox, freed in batches."""
    if place.one_process or not (has_peers(method) or has_server(method)):
        return 0
    largest = sorted((site.first_push_bytes for site in sites), reverse=True)[: place.sites_per_machine]
    at_server = len(sites) + 1 if has_server(method) else 0  # all pushes at once, and the mean
    return STORE_FACTOR * ((1 + method.max_incoming) * sum(largest) + at_server * largest[0])
