from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import pytest

from actors import cluster
from actors.cluster import Node, check_capacity, connected, num_that_fit
from gcml_ray.config import ResourcesConfig
from gcml_ray.errors import ClusterError

SITES = ("A", "B", "C")


def node(cpus: float = 8, gpus: float = 0, **labels: str) -> Node:
    return Node("machine", cpus, gpus, labels)


def resources(**values: Any) -> ResourcesConfig:
    return ResourcesConfig.model_validate(values)


def test_enough_of_everything_passes() -> None:
    check_capacity(resources(cpus_per_site=1.0, gpus_per_site=1.0), SITES, [node(2, 2), node(1, 1)])


def test_too_few_cpus_says_what_there_is_and_what_would_fit() -> None:
    with pytest.raises(ClusterError, match=r"3 sites x \(1 CPU, 0 GPU\) .* has 2 CPU .* room for 2") as error:
        check_capacity(resources(), SITES, [node(2)])
    assert "--set resources.cpus_per_site=0.66" in str(error.value)
    check_capacity(resources(cpus_per_site=0.66), SITES, [node(2)])


def test_too_few_gpus_says_what_would_fit() -> None:
    with pytest.raises(ClusterError, match=r"has 8 CPU and 1 GPU .* --set resources.gpus_per_site=0.33"):
        check_capacity(resources(gpus_per_site=1.0), SITES, [node(8, 1)])
    check_capacity(resources(gpus_per_site=0.33), SITES, [node(8, 1)])


def test_no_gpu_at_all_advises_to_ask_for_none() -> None:
    with pytest.raises(ClusterError, match=r"--set resources.gpus_per_site=0$"):
        check_capacity(resources(gpus_per_site=1.0), SITES, [node(8)])


def test_fractions_of_a_gpu_do_not_add_up_over_two_gpus() -> None:
    """0.6 + 0.6 + 0.6 is less than 2 GPUs, yet a GPU holds only one such site."""
    with pytest.raises(ClusterError, match="room for 2 site"):
        check_capacity(resources(gpus_per_site=0.6), SITES, [node(8, 2)])
    check_capacity(resources(gpus_per_site=0.5), SITES, [node(8, 2)])


def test_bundles_that_are_parts_of_a_gpu_hold_a_site_each() -> None:
    """As in the placement group of a trial; half a GPU has no room for 0.6."""
    check_capacity(resources(gpus_per_site=0.5), SITES, [node(1, 0.5)] * 3)
    with pytest.raises(ClusterError, match="room for 0 site"):
        check_capacity(resources(gpus_per_site=0.6), SITES, [node(1, 0.5)] * 3)


def test_advice_for_fractions_is_a_share_that_fits() -> None:
    with pytest.raises(ClusterError, match=r"--set resources.gpus_per_site=0.5"):
        check_capacity(resources(gpus_per_site=0.6), SITES, [node(8, 2)])


def test_advice_leaves_a_share_alone_that_fits() -> None:
    """0.29 x 100 is 28.999... in floating point, but no reason to ask for 0.28 CPU."""
    with pytest.raises(ClusterError, match=r"--set resources.gpus_per_site=0.5$") as error:
        check_capacity(resources(cpus_per_site=0.29, gpus_per_site=0.6), SITES, [node(8, 2)])
    assert "cpus_per_site" not in str(error.value)


def test_tenths_of_a_cpu_are_not_lost_to_rounding() -> None:
    """1 / 0.1 is 10 in floating point, but 0.3 / 0.1 is 2.999..."""
    check_capacity(resources(cpus_per_site=0.1), SITES, [node(0.3)])


def test_free_cpus_of_a_node_without_gpu_are_no_place_for_a_gpu_site() -> None:
    with pytest.raises(ClusterError, match="room for 1 site"):
        check_capacity(resources(gpus_per_site=1.0), SITES, [node(1, 2), node(8, 0)])


def test_cluster_without_nodes_is_an_error_with_words() -> None:
    with pytest.raises(ClusterError, match=r"0 CPU and 0 GPU on 0 node"):
        check_capacity(resources(gpus_per_site=1.0), SITES, [])


def test_advice_lowers_both_shares_where_both_are_too_high() -> None:
    """Two nodes of 2 CPUs and 1 GPU, five sites: three share a node, with 2/3 CPU and 1/3 GPU each."""
    machines = [node(2, 1), node(2, 1)]
    with pytest.raises(ClusterError, match=r"cpus_per_site=0.66 --set resources.gpus_per_site=0.33$"):
        check_capacity(resources(gpus_per_site=1.0), tuple("ABCDE"), machines)
    check_capacity(resources(cpus_per_site=0.66, gpus_per_site=0.33), tuple("ABCDE"), machines)


def test_label_placement_needs_one_labelled_node_a_site() -> None:
    check_capacity(resources(placement="label"), SITES, [node(site=site) for site in SITES])


def test_missing_label_is_named_with_those_there_are() -> None:
    with pytest.raises(ClusterError, match="no living node has the label site=C") as error:
        check_capacity(resources(placement="label"), SITES, [node(), node(site="A"), node(site="B")])
    assert "Labels there are: ['A', 'B']" in str(error.value)


def test_labelled_node_that_is_too_small_is_named() -> None:
    with pytest.raises(ClusterError, match="the node of B has 1 CPU and 0 GPU, 2 and 0 are asked for"):
        check_capacity(resources(placement="label", cpus_per_site=2.0), ("A", "B"), [node(site="A"), node(1, site="B")])


def test_all_label_problems_come_at_once() -> None:
    with pytest.raises(ClusterError, match=r"site=A; .*site=B; .*site=C"):
        check_capacity(resources(placement="label"), SITES, [node()])


@pytest.mark.parametrize("address", ["machine", "machine:", ":6379", "machine:port", "http//x"])
def test_address_that_is_not_host_and_port_is_refused(address: str) -> None:
    with pytest.raises(ClusterError, match="is not host:port"), connected(resources(address=address)):
        pytest.fail("connected to nowhere")


def test_address_where_nobody_listens_is_refused_at_once() -> None:
    expected = pytest.raises(ClusterError, match=r"cannot join the Ray cluster at 127\.0\.0\.1:1")
    with expected, connected(resources(address="127.0.0.1:1")):
        pytest.fail("connected to nowhere")


def test_ray_address_of_the_environment_is_used_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ClusterError, match=r"127.0.0.1:1 .*resources.address=local"), connected(resources()):
        pytest.fail("connected to nowhere")


def test_sites_that_share_an_actor_need_its_room_once() -> None:
    """64 sites in two actors fit on two CPUs, in three actors they do not."""
    sites = [f"site{number}" for number in range(64)]
    check_capacity(resources(sites_per_actor=32), sites, [node(2)])
    words = r"64 sites in 3 actors x \(1 CPU, 0 GPU\) do not fit: .* room for 2 actor\(s\)\. Add nodes, "
    with pytest.raises(ClusterError, match=words + "for a simulation --set resources.sites_per_actor=32") as error:
        check_capacity(resources(sites_per_actor=30), sites, [node(2)])
    assert str(error.value).endswith("--set resources.cpus_per_site=0.66")


def test_federations_at_once_are_counted_in_actors() -> None:
    """Three sites in two actors: four CPUs hold two such federations."""
    assert num_that_fit(resources(sites_per_actor=2), SITES, [node(4)]) == 2


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Exception("The current node timed out"), "here: The current node timed out.*overloaded.*needs no Ray"),
        (OSError("AF_UNIX path too long"), "set RAY_TMPDIR to a shorter folder"),
        (FileNotFoundError(2, "No such file", "/nowhere/.ray/token"), "set HOME to a folder that this user can write"),
    ],
)
def test_cluster_that_does_not_start_is_one_error_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, fault: Exception, words: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise fault

    monkeypatch.setattr(cluster.ray, "init", fail)
    with pytest.raises(ClusterError, match=f"(?s){words}"), connected(resources(address="local")):
        pass


def test_termination_while_ray_starts_is_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray answers SIGTERM with sys.exit(15) for as long as it holds the signal."""
    monkeypatch.setattr(cluster.ray, "init", lambda *_, **__: sys.exit(15))
    with pytest.raises(KeyboardInterrupt), connected(resources(address="local")):
        pass


def test_no_garbage_is_collected_while_ray_shuts_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference of Ray's in a cycle, dropped by another thread meanwhile, would end the process."""

    class Cycle:
        def __init__(self) -> None:
            self.itself = self

    seen: list[tuple[bool, bool]] = []
    left = weakref.ref(Cycle())
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "_connect", lambda _: "nowhere")
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: seen.append((left() is None, gc.isenabled())))
    with connected(resources()):
        pass
    assert seen == [(True, False)]
    assert gc.isenabled()
