"""What a run needs of memory, object store, GPU and disk, against sums worked out by hand, and whether that fits."""

from typing import Any

import pytest

from gcml_ray.config import OptimiserConfig
from gcml_ray.doctor.forecast import cache_bytes, forecast, learner_bytes, moments_per_parameter
from gcml_ray.doctor.forecast_costs import Place
from gcml_ray.doctor.machine import Machine
from tests.forecast_makers import ONE_PROCESS, cases, config, costs

# --- memory and disk ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimiser", "moments"),
    [
        ({"name": "adamw"}, 2),
        ({"name": "adam", "amsgrad": True}, 3),
        ({"name": "sgd", "momentum": 0.9}, 1),
        ({"name": "sgd"}, 0),
    ],
)
def test_moments_of_an_optimiser(optimiser: dict[str, Any], moments: int) -> None:
    assert moments_per_parameter(OptimiserConfig(learning_rate=0.1, **optimiser)) == moments


def test_two_learners_hold_weights_gradient_and_moments_each() -> None:
    assert learner_bytes(config(), costs("A")) == 2 * 4 * (1100 + 1000 + 2 * 1000)


def test_an_incoming_model_that_takes_no_steps_has_no_moments() -> None:
    method = {"name": "gossip_avg", "topology": {"name": "ring"}}
    assert learner_bytes(config(method=method), costs("A")) == 4 * (2 * (1100 + 1000) + 2 * 1000)


def test_cached_cases_softmax() -> None:
    """6 cases x 1000 voxels x (2 channels x 4 bytes + 1 byte of label) + 3 training cases x 1000 x 4 of indices."""
    assert cache_bytes(cases("A"), config().data) == 6000 * 9 + 3000 * 4


def test_cached_cases_sigmoid() -> None:
    """Regions are stored as one float32 mask each."""
    data = {"regions": {"whole": ["lesion"], "again": ["lesion"]}}
    assert cache_bytes(cases("A"), config(data=data).data) == 6000 * (8 + 2 * 4) + 3000 * 4


def test_one_process_shares_interpreter_and_activations() -> None:
    """Interpreter + 2 x (cases + mailbox + learners + 3 candidates) + one site's activations."""
    needs = forecast(config(), [cases("A"), cases("B")], [costs("A"), costs("B")], ONE_PROCESS)
    own = (6000 * 9 + 12000) + 4400 + 2 * 4 * 4100 + 3 * 4400
    assert needs.machine_memory_bytes == 1_000_000 + 2 * own + 5_000_000
    assert needs.object_store_bytes == 0


def test_processes_have_an_interpreter_each_and_ray_its_own() -> None:
    place = Place(slots=2, sites_per_machine=2, interpreter_bytes=1_000_000, one_process=False)
    needs = forecast(config(), [cases("A"), cases("B")], [costs("A"), costs("B")], place)
    own = (6000 * 9 + 12000) + 4400 + 2 * 4 * 4100 + 3 * 4400 + 5_000_000
    assert needs.machine_memory_bytes == 500_000_000 + 2 * (1_000_000 + own)


def test_workers_have_an_interpreter_each() -> None:
    place = Place(slots=2, sites_per_machine=2, interpreter_bytes=1_000_000, one_process=False)
    both = [cases("A"), cases("B")], [costs("A"), costs("B")]
    alone, helped = (forecast(config(data={"num_workers": number}), *both, place) for number in (0, 3))
    assert helped.machine_memory_bytes - alone.machine_memory_bytes == 2 * 3 * 1_000_000


def test_sites_that_share_a_process_share_all_that_only_the_working_one_needs() -> None:
    """Each keeps cases, mailbox, weights and two moments; gradient, second learner, candidates, activations once."""
    place = Place(slots=1, sites_per_machine=2, interpreter_bytes=1_000_000, one_process=False, sites_per_process=2)
    both = [cases("A"), cases("B")], [costs("A"), costs("B")]
    needs = forecast(config(resources={"sites_per_actor": 2}), *both, place)
    waiting = (6000 * 9 + 12000) + 4400 + 4400 + 8000
    working = 4000 + 4 * (1100 + 1000 + 2 * 1000) + 3 * 4400 + 5_000_000
    assert needs.machine_memory_bytes == 500_000_000 + 1_000_000 + 2 * waiting + working
    on_disk = forecast(config(resources={"sites_per_actor": 2, "park": "disk"}), *both, place)
    gone = 2 * (waiting - 4400)  # the mailbox stays
    back = waiting - 4400  # of the one that works
    assert on_disk.machine_memory_bytes == needs.machine_memory_bytes - gone + back


def test_object_store_holds_own_and_incoming_pushes_twice() -> None:
    place = Place(slots=2, sites_per_machine=2, interpreter_bytes=0, one_process=False)
    method = {"name": "gcml", "topology": {"name": "ring"}, "max_incoming": 3}
    needs = forecast(config(method=method), [cases("A"), cases("B")], [costs("A"), costs("B")], place)
    assert needs.object_store_bytes == 2 * 2 * (1 + 3) * 4400


def test_a_second_model_is_part_of_each_checkpoint() -> None:
    two = config(method={"name": "ditto", "lambda": 1.0})
    needs = forecast(two, [cases("A"), cases("B")], [costs("A"), costs("B")], ONE_PROCESS)
    assert needs.disk_bytes == 2 * (4 * 2 * (4400 + 8000) + 4 * 4400)


def test_checkpoints_are_two_rounds_one_in_writing_and_three_models() -> None:
    needs = forecast(config(), [cases("A"), cases("B")], [costs("A"), costs("B")], ONE_PROCESS)
    assert needs.disk_bytes == 2 * (4 * (4400 + 8000) + 4 * 4400)


def test_on_a_gpu_the_models_do_not_take_host_memory() -> None:
    """Host: cases + mailbox + pinned push + the scoring of a case. GPU: learners, candidates, activations, context."""
    place = Place(slots=1, sites_per_machine=1, interpreter_bytes=0, one_process=False)
    gpu = config(resources={"gpus_per_site": 0.5})
    needs = forecast(gpu, [cases("A"), cases("B")], [costs("A", on_gpu=True), costs("B", on_gpu=True)], place)
    assert needs.sites[0].host_bytes == (6000 * 9 + 12000) + 4400 + 4400 + 1000 * (40 + 2 * 4 * 2)
    one = 2 * 4 * 4100 + 3 * 4400 + 5_000_000 + 600_000_000
    assert needs.one_gpu_bytes == 2 * one  # two sites share it


def test_what_loading_and_scoring_take_for_a_while_is_part_of_a_site_s_memory() -> None:
    """Six cases of 1000 voxels; the checkpoint's copy, activations or scores, whatever is more, or loading."""
    place = Place(slots=1, sites_per_machine=1, interpreter_bytes=0, one_process=False)
    small, usual, large = (
        forecast(config(), [cases("A")], [costs("A", activation_bytes=activations, load_bytes=load_bytes)], place)
        for activations, load_bytes in ((10, 0.0), (5_000_000, 0.0), (5_000_000, 1e5))
    )
    rest = usual.sites[0].resting_bytes
    assert small.sites[0].host_bytes == small.sites[0].resting_bytes + 1000 * (40 + 2 * 4 * 2)
    assert usual.sites[0].host_bytes == rest + 5_000_000
    assert large.sites[0].host_bytes == (6000 * 9 + 12000) + 100_000_000


def test_in_one_process_one_site_loads_or_scores_at_a_time() -> None:
    needs = forecast(config(), [cases("A"), cases("B")], [costs("A", load_bytes=1e5), costs("B")], ONE_PROCESS)
    first, second = needs.sites
    assert first.host_bytes > 100_000_000
    assert needs.machine_memory_bytes == 1_000_000 + first.host_bytes + second.resting_bytes


# --- verdicts ----------------------------------------------------------------------------------


def needs_on(machine: Machine, **changes: Any) -> dict[str, str]:
    place = Place(slots=1, sites_per_machine=2, interpreter_bytes=0, one_process=False)
    gpu = config(resources={"gpus_per_site": 0.5}) if changes.get("on_gpu") else config()
    made = forecast(gpu, [cases("A"), cases("B")], [costs("A", **changes), costs("B", **changes)], place)
    return {check.name: check.verdict for check in made.to_checks(machine)}


def test_everything_fits_on_a_large_machine() -> None:
    assert set(needs_on(Machine(2, 10**12, 10**12)).values()) == {"PASS"}


def test_too_little_memory_fails() -> None:
    assert needs_on(Machine(2, 400_000_000, 10**12))["memory"] == "FAIL"


def test_memory_that_is_nearly_full_warns() -> None:
    assert needs_on(Machine(2, 550_000_000, 10**12))["memory"] == "WARN"


def test_an_object_store_that_is_too_small_warns() -> None:
    """30 % of 100 MB is less than 2 x 2 x 2 x 4 x 10 million bytes."""
    assert needs_on(Machine(2, 100_000_000, 10**12), num_sent=10_000_000)["object store"] == "WARN"


def test_a_gpu_that_is_too_small_fails() -> None:
    assert needs_on(Machine(2, 10**12, 10**12, gpu_bytes=(10**9,)), on_gpu=True)["gpu memory"] == "FAIL"
    assert needs_on(Machine(2, 10**12, 10**12, gpu_bytes=(2 * 10**9,)), on_gpu=True)["gpu memory"] == "PASS"
