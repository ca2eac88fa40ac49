from typing import Any

import pytest
import torch
from torch import nn

from gcml_ray.config import GcmlMethod, GmlMethod, RingTopology
from gcml_ray.doctor.forecast import cache_bytes, forecast, learner_bytes
from gcml_ray.doctor.forecast_costs import Place
from gcml_ray.doctor.forecast_time import num_windows, planned_rounds, scoring_passes, step_seconds
from gcml_ray.doctor.machine import Machine
from gcml_ray.prediction.inference import predict_logits
from gcml_ray.wording import duration
from tests.forecast_makers import ONE_PROCESS, cases, config, costs

NUM_TRAIN = {"A": 3, "B": 3, "C": 3, "D": 3}


def line(needs: Any, name: str) -> str:
    machine = Machine(2, 10**12, 10**12)
    return next(check.detail for check in needs.to_checks(machine) if check.name == name)


# --- pushes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topology", "max_incoming", "pushes_a_round"),
    [
        ({"name": "matching"}, 1, 4),  # N
        ({"name": "matching", "symmetric": False}, 1, 2),  # N / 2
        ({"name": "ring"}, 1, 4),  # N
        ({"name": "exponential"}, 1, 4),  # N
        ({"name": "push_k", "k": 2}, 2, 8),  # N k
        ({"name": "push_k", "k": 2}, 1, 4),  # each of the N receivers takes one of its two
    ],
)
def test_pushes_of_a_topology(topology: dict[str, Any], max_incoming: int, pushes_a_round: int) -> None:
    method = {"name": "gcml", "topology": topology, "max_incoming": max_incoming}
    plans = planned_rounds(config(method=method), NUM_TRAIN)
    assert [len(plan.edges) for plan in plans] == [0, *[pushes_a_round] * 7, 0, 0]


def test_pushes_follow_the_schedule() -> None:
    """C and D are there from round 4 until before round 6: on a ring then four sites push, else two."""
    schedule = {site: {"joins": 4, "leaves": 6} for site in ("C", "D")}
    federation = {"schedule": schedule, "rounds": 10, "warmup_rounds": 1, "cooldown_rounds": 2}
    method = {"name": "gcml", "topology": {"name": "ring"}}
    plans = planned_rounds(config(method=method, federation=federation), NUM_TRAIN)
    assert [len(plan.sites) for plan in plans] == [2, 2, 2, 4, 4, 2, 2, 2, 2, 2]
    assert [len(plan.edges) for plan in plans] == [0, 2, 2, 4, 4, 2, 2, 2, 0, 0]


def test_bernoulli_pushes_come_to_the_expected_senders() -> None:
    """With m = 1.5 in each of 2000 rounds the mean is 1.5 within four standard errors, sqrt(4 p (1 - p) / 2000)."""
    method = {"name": "gcml", "topology": {"name": "bernoulli", "expected_senders": 1.5}}
    federation = {"rounds": 2000, "warmup_rounds": 0, "cooldown_rounds": 0}
    plans = planned_rounds(config(method=method, federation=federation), NUM_TRAIN)
    assert sum(len(plan.edges) for plan in plans) / 2000 == pytest.approx(
        1.5, abs=4 * (4 * 0.375 * 0.625 / 2000) ** 0.5
    )


def test_traffic_is_pushes_times_sent_bytes_and_is_compared_with_fedavg() -> None:
    """7 exchange rounds x 2 pushes x 4 bytes x 1100 values; FedAvg would upload as much, and send it back."""
    needs = forecast(config(), [cases("A"), cases("B")], [costs("A"), costs("B")], ONE_PROCESS)
    assert (needs.num_exchange_rounds, needs.num_pushes) == (7, 14)
    assert needs.pushed_bytes == 14 * 4400
    assert needs.fedavg_upload_bytes == 14 * 4400
    assert "100% of FedAvg's uploads in the same rounds, 50% of its uploads and downloads" in line(needs, "traffic")


def test_unsent_buffers_do_not_count_as_traffic() -> None:
    needs = forecast(config(), [cases("A"), cases("B")], [costs("A", num_sent=1000), costs("B")], ONE_PROCESS)
    assert needs.pushed_bytes == 7 * (4000 + 4400)


@pytest.mark.parametrize(
    ("wire", "first", "later"),
    [
        ({"encoding": "float16"}, 2 * 1000 + 4 * 100, 2 * 1000 + 4 * 100),  # 100 buffers travel as they are
        ({"encoding": "int8"}, 1000 + 4 + 4 * 100, 1000 + 4 + 4 * 100),  # one scale for a block of up to 4096 values
        ({"encoding": "topk", "topk_share": 0.01}, 4400, 8 + 40 + 20 + 400),  # 10 places of 4 bytes, values of 2
        ({"encoding": "topk", "topk_share": 0.5}, 4400, 8 + 128 + 1000 + 400),  # places as a bitmap: 32 words
    ],
)
def test_traffic_counts_what_travels(wire: dict[str, Any], first: int, later: int) -> None:
    """Two sites push to each other in 7 rounds: 2 first pushes, 12 later ones."""
    needs = forecast(config(wire=wire), [cases("A"), cases("B")], [costs("A"), costs("B")], ONE_PROCESS)
    assert needs.pushed_bytes == 2 * first + 12 * later
    assert needs.sites[0].push_bytes == later
    assert needs.sites[0].vector_bytes == 4400


def test_local_training_has_no_pushes_and_no_exchange_rounds() -> None:
    needs = forecast(config(method={"name": "local"}), [cases("A")], [costs("A")], ONE_PROCESS)
    assert (needs.num_pushes, needs.num_exchange_rounds, needs.exchange_round_s) == (0, 0, 0.0)
    assert line(needs, "traffic") == "no pushes"


# --- time --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("merge", "merge_first", "num_incoming", "evaluates", "passes"),
    [
        ("select_best", "none", 1, True, 4),  # before, after, incoming, mix; the best one's score is the record
        ("select_best", "none", 1, False, 4),
        ("select_best", "none", 2, True, 8),
        ("select_best", "val_weighted", 1, True, 6),
        ("val_weighted", "none", 1, True, 3),
        ("keep_local", "none", 1, True, 1),
        ("keep_local", "none", 1, False, 0),
        ("select_best", "none", 0, True, 1),
    ],
)
def test_scoring_passes(merge: Any, merge_first: Any, num_incoming: int, evaluates: bool, passes: int) -> None:
    method = GcmlMethod(name="gcml", topology=RingTopology(name="ring"), merge=merge, merge_first=merge_first)
    assert scoring_passes(method, num_incoming=num_incoming, evaluates=evaluates) == passes


def test_gml_scores_once() -> None:
    method = GmlMethod(name="gml", topology=RingTopology(name="ring"))
    assert scoring_passes(method, num_incoming=1, evaluates=True) == 1


def test_rounds_in_one_process_add_up() -> None:
    """Alone: 5 x 0.1 steps + 2 windows x 0.05 + 0.01. Exchange: 5 x 0.3 + 4 x 2 x 0.05 + 0.01. Two sites."""
    needs = forecast(config(), [cases("A"), cases("B")], [costs("A"), costs("B")], ONE_PROCESS)
    assert needs.alone_round_s == pytest.approx(2 * 0.61)
    assert needs.exchange_round_s == pytest.approx(2 * 1.91)


def test_total_time_is_loading_rounds_and_the_test_of_two_models() -> None:
    """Loading 2 x 6000 voxels x 1 ms; 3 rounds alone, 7 with; test of 2 models: 2 x (0.05 + 1000 x 2 ms)."""
    needs = forecast(config(), [cases("A"), cases("B")], [costs("A"), costs("B")], ONE_PROCESS)
    assert needs.total_s == pytest.approx(12 + 3 * 1.22 + 7 * 3.82 + 2 * 2 * 2.05)


def test_visits_to_other_sites_are_tests_too() -> None:
    """Two models at home and one visitor: 3 x 2.05 s for each of two sites."""
    needs = forecast(
        config(evaluation={"cross_site": True}), [cases("A"), cases("B")], [costs("A"), costs("B")], ONE_PROCESS
    )
    assert needs.total_s == pytest.approx(12 + 3 * 1.22 + 7 * 3.82 + 2 * 3 * 2.05)


def test_an_ensemble_is_chosen_on_validation_cases_and_tested() -> None:
    """Three tests, of which one with two members; before it own, peer and both (4 predictions) on validation."""
    needs = forecast(
        config(evaluation={"ensemble_peers": 2}), [cases("A"), cases("B")], [costs("A"), costs("B")], ONE_PROCESS
    )
    without = forecast(config(), [cases("A"), cases("B")], [costs("A"), costs("B")], ONE_PROCESS)
    assert needs.total_s - without.total_s == pytest.approx(2 * (2.05 + 0.05 + 4 * 0.1))


def test_sites_in_parallel_wait_for_the_slowest_one() -> None:
    place = Place(slots=2, sites_per_machine=2, interpreter_bytes=0, one_process=False)
    needs = forecast(config(), [cases("A"), cases("B")], [costs("A"), costs("B", local_step_s=0.2)], place)
    assert needs.alone_round_s == pytest.approx(5 * 0.2 + 0.11)


def test_more_sites_than_slots_share_them() -> None:
    place = Place(slots=1.5, sites_per_machine=2, interpreter_bytes=0, one_process=False)
    needs = forecast(config(), [cases("A"), cases("B")], [costs("A"), costs("B")], place)
    assert needs.alone_round_s == pytest.approx(2 * 0.61 / 1.5)


def test_a_round_without_evaluation_and_checkpoint_is_steps_alone() -> None:
    """Of the rounds without exchange, 1 ends the warm-up, 9 has steps only, 10 is the last and writes as well."""
    rare = config(federation={"evaluate_every": 100}, output={"checkpoint_every": 100})
    needs = forecast(rare, [cases("A"), cases("B")], [costs("A"), costs("B")], ONE_PROCESS)
    assert needs.alone_round_s == pytest.approx(2 * (0.6 + 0.5 + 0.61) / 3)


def test_gossip_averaging_takes_local_steps() -> None:
    method = {"name": "gossip_avg", "topology": {"name": "ring"}}
    needs = forecast(config(method=method), [cases("A"), cases("B")], [costs("A"), costs("B")], ONE_PROCESS)
    assert needs.exchange_round_s == pytest.approx(needs.alone_round_s)


@pytest.mark.parametrize(
    ("shape", "count"),
    [((10, 10), 1), ((6, 10), 1), ((11, 10), 2), ((15, 10), 2), ((16, 20), 3 * 3)],  # steps of 5 voxels
)
def test_windows_are_counted_as_monai_lays_them(shape: tuple[int, int], count: int) -> None:
    class Counting(nn.Module):
        seen = 0

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            self.seen += len(image)
            return image

    network = Counting()
    image = torch.zeros(1, *shape)
    device = torch.device("cpu")
    predict_logits(network, image, patch_size=(10, 10), overlap=0.5, window_batch=4, device=device, amp="none")
    assert num_windows(shape, (10, 10), 0.5) == count == network.seen


@pytest.mark.parametrize(("seconds", "words"), [(90, "90 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


# --- the other methods -------------------------------------------------------------------------


def test_a_server_takes_two_pushes_a_site_in_every_exchange_round() -> None:
    """7 exchange rounds x 2 sites x 4400 bytes, up and down; FedAvg over all 10 rounds uploads 2 x 10 of them."""
    needs = forecast(config(method={"name": "fedavg"}), [cases("A"), cases("B")], [costs("A"), costs("B")], ONE_PROCESS)
    assert (needs.num_exchange_rounds, needs.num_pushes) == (7, 28)
    assert needs.pushed_bytes == 28 * 4400


def test_a_server_needs_room_for_every_push_and_the_mean() -> None:
    """Beside what the sites need: 2 pushes, the mean and a product on its way, 4400 bytes each."""
    needs, alone = (
        forecast(config(method={"name": name}), [cases("A"), cases("B")], [costs("A"), costs("B")], ONE_PROCESS)
        for name in ("fedavg", "local")
    )
    mailboxes = 2 * 4400
    assert needs.machine_memory_bytes - alone.machine_memory_bytes == (2 + 2) * 4400 + mailboxes


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        # seconds a step in warm-up, exchange and cool-down
        ({"name": "fedavg"}, (0.1, 0.1, 0.1)),
        ({"name": "ditto", "lambda": 1.0}, (0.2, 0.2, 0.1)),
        ({"name": "proxyfl", "topology": {"name": "ring"}, "alpha": 0.5, "beta": 0.5}, (0.2, 0.3, 0.1)),
    ],
)
def test_two_models_take_two_steps_until_the_cooldown(method: dict[str, Any], steps: tuple[float, ...]) -> None:
    seconds = [
        step_seconds(config(method=method), costs("A"), num_incoming=0, round_number=number) for number in (1, 2, 10)
    ]
    assert seconds == pytest.approx(steps)


@pytest.mark.parametrize("num_incoming", [0, 1])
def test_defkt_takes_mutual_steps_where_a_model_came_in(num_incoming: int) -> None:
    method = {"name": "defkt", "topology": {"name": "ring"}}
    seconds = step_seconds(config(method=method), costs("A"), num_incoming=num_incoming, round_number=2)
    assert seconds == pytest.approx(0.3 if num_incoming else 0.1)


def test_a_second_model_has_weights_gradient_and_moments() -> None:
    """Two of 1100 weights, 1000 gradients and 2 x 1000 moments, and the learner that the test loads into."""
    method = {"name": "ditto", "lambda": 1.0}
    assert learner_bytes(config(method=method), costs("A")) == 4 * (2 * (1100 + 1000 + 2000) + 1100 + 1000)


def test_pooled_training_is_one_site_with_all_cases() -> None:
    needs = forecast(config(method={"name": "pooled"}), [cases("A"), cases("B")], [costs("A"), costs("B")], ONE_PROCESS)
    assert [site.site for site in needs.sites] == ["pooled"]
    assert needs.sites[0].cache_bytes == 2 * cache_bytes(cases("A"), config().data)
    assert (needs.num_pushes, needs.num_exchange_rounds) == (0, 0)
