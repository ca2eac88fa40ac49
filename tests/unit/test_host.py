"""Several sites in one process: the results of one process each, the end of all when it ends, and what they share."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from actors.host import HostedSite, Seating, SiteHost
from actors.local_pool import LocalPool
from actors.site import NotStartedError
from gcml_ray.config import SERVER, Config
from gcml_ray.records import TrainOrder
from tests.fakes import FakeTrainers, Fault, calls_of, fake_config
from tests.makers import make_config
from tests.runs import Run, run_locally, run_real

ROUNDS = {"rounds": 3, "local_steps": 2, "warmup_rounds": 1, "cooldown_rounds": 0}
NETWORK = {
    "name": "unet",
    "options": {"channels": [4, 8], "strides": [2], "num_res_units": 1, "norm": "BATCH", "dropout": 0.2},
}
OTHER = {"name": "unet", "options": {"channels": [4, 6], "strides": [2], "num_res_units": 0, "norm": "BATCH"}}
GCML = {"name": "gcml", "topology": {"name": "ring"}, "merge": "select_best"}


def run(folder: Path, per_actor: int, **sections: Any) -> Run:
    """Four real sites with tiny pictures in this process."""
    folder.mkdir()
    values: dict[str, Any] = {"method": GCML, "network": NETWORK, "federation": ROUNDS} | sections
    resources = {"sites_per_actor": per_actor} | values.pop("resources", {})
    config = make_config(folder, num_sites=4, spatial_dims=2, resources=resources, **values)
    return run_real(config)


def last_files(run: Run) -> dict[str, dict[str, Any]]:
    """Everything in the last checkpoint of each site, and in its best model."""
    sites = run.folder.path / "checkpoints"
    names = ("round_00003.safetensors", "personalised.safetensors")
    files = [path for name in names for path in sorted(sites.glob(f"*/{name}"))]
    return {str(path.relative_to(sites)): load_file(path) for path in files}


def assert_same_results(first: Run, second: Run) -> None:
    """Checkpoints bit for bit, and the records but for their clocks."""
    mine, other = last_files(first), last_files(second)
    assert mine.keys() == other.keys()
    assert len(mine) >= 8
    for name, tensors in mine.items():
        assert tensors.keys() == other[name].keys()
        for key, values in tensors.items():
            np.testing.assert_array_equal(other[name][key], values, err_msg=f"{name} {key}")
    for one, two in zip(first.folder.rounds(), second.folder.rounds(), strict=True):
        assert [(push.sender, push.receiver, push.accepted, push.size_bytes) for push in one.pushes] == [
            (push.sender, push.receiver, push.accepted, push.size_bytes) for push in two.pushes
        ]
        assert [(report.losses, report.validation_dice) for report in one.trained] == [
            (report.losses, report.validation_dice) for report in two.trained
        ]


# --- the same results ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({}, id="gcml"),
        pytest.param({"resources": {"park": "disk"}}, id="gcml parked on disk"),
        pytest.param({"federation": ROUNDS | {"common_init": False}}, id="own initial weights"),
        pytest.param({"method": {"name": "ditto", "lambda": 0.1}}, id="two models and a server"),
        pytest.param(
            {"method": {"name": "proxyfl", "topology": {"name": "ring"}, "alpha": 0.5, "beta": 0.5}},
            id="two models, coupled",
        ),
        pytest.param(
            {
                "method": {"name": "gml", "topology": {"name": "ring"}, "buffers": "keep"},
                "site_networks": {"B": OTHER, "D": OTHER},
            },
            id="two architectures",
        ),
        pytest.param({"optimiser": {"weight_average": 0.9, "push_average": True}}, id="averaged weights"),
        pytest.param({"evaluation": {"cross_site": True}}, id="visits"),
        pytest.param({"federation": ROUNDS | {"mode": "async"}}, id="without a barrier"),
    ],
)
def test_sites_of_one_process_get_the_weights_of_a_process_each(tmp_path: Path, sections: dict[str, Any]) -> None:
    alone = {name: values for name, values in sections.items() if name != "resources"}
    assert_same_results(run(tmp_path / "alone", 1, **alone), run(tmp_path / "together", 4, **sections))


def test_an_uneven_number_of_sites_is_spread_and_gives_the_same(tmp_path: Path) -> None:
    assert_same_results(run(tmp_path / "alone", 1), run(tmp_path / "three", 3))


# --- what is shared --------------------------------------------------------------------------------


def host_of(folder: Path, sites: str = "AB", **resources: Any) -> SiteHost:
    """Real sites that were started."""
    config = make_config(
        folder, num_sites=len(sites), network=NETWORK, method=GCML, resources={"sites_per_actor": 2} | resources
    )
    host = SiteHost(config, config.output.folder, run_id="run", use_gpu=False)
    for site in sites:
        host.call(site, "start", LocalPool(config, "", run_id="run")._transport, tuple(sites), 0)
    return host


def test_network_gradient_and_second_learner_are_there_once_but_weights_and_moments_for_each(tmp_path: Path) -> None:
    host = host_of(tmp_path)
    for site in "AB":
        host.call(site, "train", TrainOrder(1, "warmup", evaluate=True, checkpoint=False))
    a, b = (host._sites[site].trainer for site in "AB")
    assert a.local.model.module is b.local.model.module
    assert a.local.model.gradient is b.local.model.gradient
    network = a.config.network
    assert a.exchange.learner_for(network) is b.exchange.learner_for(network)
    assert a.local.model.flat.data_ptr() != b.local.model.flat.data_ptr()
    moments = [one.local.optimiser.moments["exp_avg"] for one in (a, b)]
    assert moments[0].data_ptr() != moments[1].data_ptr()
    counters = [one.local.model.counters() for one in (a, b)]
    assert counters[0]
    assert all(one.data_ptr() != two.data_ptr() for one, two in zip(*(c.values() for c in counters), strict=True))


def test_a_site_that_waits_can_be_pushed_while_its_network_has_the_weights_of_another(tmp_path: Path) -> None:
    host = host_of(tmp_path)
    trainer = host._sites["A"].trainer
    before = trainer.local.model.flat.clone()
    host.call("B", "train", TrainOrder(1, "warmup", evaluate=False, checkpoint=False))
    _, buffer = trainer.export("run", 1)
    np.testing.assert_array_equal(buffer, before[: trainer.local.model.num_sent].numpy())


def test_a_round_broken_off_is_mended_at_the_shared_network_too(tmp_path: Path) -> None:
    config = {"federation": ROUNDS, "chaos": "raise:B@merge@r2"}
    alone = run(tmp_path / "alone", 1, **config)
    together = run(tmp_path / "together", 4, **config)
    assert alone.failures() == together.failures() == [("B", 2, "raised", "skip")]
    assert_same_results(alone, together)


# --- the end of a process --------------------------------------------------------------------------


def test_a_kill_takes_the_mates_along_and_all_go_on_from_their_checkpoints(tmp_path: Path) -> None:
    run = run_locally(chaotic(fake_config(tmp_path, sites="ABCD", resources={"sites_per_actor": 2}), "kill:A@r2"))
    assert run.summary.status == "finished"
    assert [(site, number, kind) for site, number, kind, _ in run.failures()] == [
        ("A", 2, "died"),
        ("C", 2, "unreachable"),
    ]
    assert [failure.culprit for failure, _ in run.listener.failures] == ["", "A"]
    assert [calls_of(run.folder, site, "start") for site in "ABCD"] == [[0, 0], [0], [0, 0], [0]]
    assert [run.trained(site)[-2:] for site in "ABCD"] == [[3, 4]] * 4


def test_only_the_one_that_breaks_down_again_and_again_is_dropped(tmp_path: Path) -> None:
    faults = ", ".join(f"kill:A@r{number}" for number in (1, 2, 3, 4, 5))
    sections = {"federation": {"rounds": 6}, "resources": {"sites_per_actor": 4}}
    run = run_locally(chaotic(fake_config(tmp_path, sites="ABCD", **sections), faults))
    assert run.summary.status == "finished"
    assert list(run.summary.dropped) == ["A"]
    assert [run.trained(site)[-1] for site in "BCD"] == [6, 6, 6]


def test_a_site_that_only_raises_leaves_the_others_alone(tmp_path: Path) -> None:
    config = fake_config(tmp_path, resources={"sites_per_actor": 3})
    run = run_locally(config, *(Fault("B", number, "train", "raise") for number in (1, 2, 3)))
    assert list(run.summary.dropped) == ["B"]
    assert [calls_of(run.folder, site, "start") for site in "AC"] == [[0]] * 2


def test_a_process_that_was_replaced_knows_no_site(tmp_path: Path) -> None:
    config = fake_config(tmp_path, resources={"sites_per_actor": 2})
    host = SiteHost(config, "", run_id="run", use_gpu=False, make_trainer=FakeTrainers())
    with pytest.raises(NotStartedError, match="site A has a new process"):
        host.call("A", "push", 1, ("B",), 5.0)
    assert host.statuses() == []


# --- seats -----------------------------------------------------------------------------------------


def seating(folder: Path, per_actor: int) -> Seating:
    return Seating(fake_config(folder, resources={"sites_per_actor": per_actor}))


def test_sites_are_spread_evenly_and_a_server_sits_alone(tmp_path: Path) -> None:
    """Five sites, at most three in a process: two processes, with three and two."""
    seats = seating(tmp_path, 3)
    assert seats.seat_all([*"ABCDE", SERVER]) == 2
    assert [seats.mates(site) for site in "ABCDE"] == [("C", "E"), ("D",), ("A", "E"), ("B",), ("A", "C")]
    assert seats.mates(SERVER) == ()


def test_who_joins_sits_where_there_is_room_else_in_a_new_process(tmp_path: Path) -> None:
    seats = seating(tmp_path, 2)
    seats.seat_all("AB")
    assert seats.seat("C") == 1
    assert seats.seat("D") == 1
    assert seats.seat("E") == 2
    seats.leave("A")
    assert seats.seat("F") == 0
    assert seats.mates("F") == ("B",)


def test_handle_of_a_hosted_site_can_be_sent_to_another_process() -> None:
    handle = pickle.loads(pickle.dumps(HostedSite("actor", "A")))  # noqa: S301 - our own
    assert (handle.actor, handle.name) == ("actor", "A")


# --- configuration ---------------------------------------------------------------------------------


def test_one_process_cannot_promise_nodes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="placement: label cannot be kept: with pool: local"):
        fake_config(tmp_path, resources={"pool": "local", "placement": "label"})


def test_label_placement_keeps_each_site_on_its_own_node(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sites_per_actor 2 would put the data of several sites into one process"):
        fake_config(tmp_path, resources={"pool": "ray", "sites_per_actor": 2, "placement": "label"})


def test_parking_is_refused_where_no_site_waits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="park: disk would be ignored"):
        fake_config(tmp_path, resources={"park": "disk"})


def test_a_deadline_is_refused_where_sites_take_turns(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="round_deadline_s would be ignored: sites_per_actor"):
        fake_config(tmp_path, resources={"sites_per_actor": 2}, federation={"round_deadline_s": 5.0})


def test_sites_that_share_a_process_have_no_processes_of_their_own_for_patches(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_workers 2 would keep the cases of every site that waits in memory"):
        make_config(tmp_path, resources={"sites_per_actor": 2}, data={"num_workers": 2})


def test_sharing_a_process_does_not_change_the_identity_of_a_run(tmp_path: Path) -> None:
    config = fake_config(tmp_path)
    shared = replace_resources(config, sites_per_actor=8, park="disk")
    assert shared.identity == config.identity


def chaotic(config: Config, text: str) -> Config:
    """The same federation with faults."""
    return config.model_copy(update={"chaos": text})


def replace_resources(config: Config, **values: Any) -> Config:
    return config.model_copy(update={"resources": config.resources.model_copy(update=values)})
