"""How long a run will take, and which pushes it makes: arithmetic over the costs of its sites."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from gcml_ray.config import Config, DittoMethod, GcmlMethod, Method, ProxyFlMethod, takes_mutual_steps
from gcml_ray.doctor.forecast_costs import SiteCases, SiteCosts
from gcml_ray.gossip.graph import plan_round
from gcml_ray.gossip.phases import models_to_test, order_of, phase_of
from gcml_ray.records import RoundPlan, Split


def planned_rounds(config: Config, num_train: dict[str, int]) -> tuple[RoundPlan, ...]:
    """Every round as the driver will plan it while no site is lost, and whoever joins is ready in time."""
    schedule = config.federation.schedule

    def here(number: int) -> dict[str, int]:
        away = {site for site, entry in schedule.items() if not entry.joins <= number < (entry.leaves or math.inf)}
        return {site: cases for site, cases in num_train.items() if site not in away} or num_train

    return tuple(
        plan_round(config.method, config.federation, round_number=number, num_train=here(number))
        for number in range(1, config.federation.rounds + 1)
    )


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
    order = order_of(config, round_number)
    step_s = step_seconds(config, costs, num_incoming=num_incoming, round_number=round_number)
    passes = scoring_passes(config.method, num_incoming=num_incoming, evaluates=order.evaluate)
    pass_s = costs.window_s * _windows(config, cases, "validation")
    return config.federation.local_steps * step_s + passes * pass_s + order.checkpoint * costs.checkpoint_s


def step_seconds(config: Config, costs: SiteCosts, *, num_incoming: int, round_number: int) -> float:
    """One step of a site in a round; methods with two models train both until the cool-down."""
    phase = phase_of(config.federation, round_number)
    method = config.method
    if isinstance(method, DittoMethod | ProxyFlMethod) and phase != "cooldown":
        is_coupled = isinstance(method, ProxyFlMethod) and phase == "exchange"
        return costs.mutual_step_s if is_coupled else 2 * costs.local_step_s
    return costs.mutual_step_s if num_incoming and takes_mutual_steps(method) else costs.local_step_s


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
            if one.site in plan.sites
        ],
        slots,
    )


def _shared(seconds: Sequence[float], slots: float) -> float:
    return max(*seconds, sum(seconds) / slots)


def start_and_test_seconds(
    config: Config, cases: Sequence[SiteCases], costs: Sequence[SiteCosts], slots: float
) -> float:
    """Reading all cases, and the test: every model at home, an ensemble's choice, and the visits to other sites."""
    pairs = list(zip(cases, costs, strict=True))
    load = [cost.load_s * one.voxels("train", "validation", "test") for one, cost in pairs]
    predict = [cost.window_s * _windows(config, one, "test") for one, cost in pairs]
    score = [cost.score_s * one.voxels("test") for one, cost in pairs]
    validate = [cost.window_s * _windows(config, one, "validation") for one, cost in pairs]
    num_visits = len(pairs) - 1 if config.evaluation.cross_site else 0
    num_tests = len(models_to_test(config)) + num_visits
    num_peers = min(config.evaluation.ensemble_peers, len(pairs) - 1)  # beside the own model, each predicts too
    num_validations = 0  # of an ensemble's choice: own, each peer, own and more and more of them
    if num_peers:
        num_validations = 1 + num_peers + sum(range(2, num_peers + 2))
    test = [
        num_tests * (predicting + scoring) + num_peers * predicting + num_validations * validating
        for predicting, scoring, validating in zip(predict, score, validate, strict=True)
    ]
    return _shared(load, slots) + _shared(test, slots)
