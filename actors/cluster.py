"""Joining a Ray cluster or starting a local one, and asking early whether the federation fits on it."""

from __future__ import annotations

import gc
import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private.services import canonicalize_bootstrap_address
from ray.util.placement_group import get_current_placement_group

from gcml_ray.config import ResourcesConfig
from gcml_ray.errors import ClusterError

log = logging.getLogger(__name__)

REACH_TIMEOUT_S = 5.0
FREE_PERIOD = "RAY_free_objects_period_milliseconds"  # read by a raylet as it starts
FREE_PERIOD_MS = "20"  # Ray's own 1000 lets models that nobody needs pile up, and the next ones go to cold memory
OWN = "gcml_run_of_its_own"  # a resource that marks a cluster which ends with the run that started it
_WHERE = ""  # in words, while this process is connected by connected()
_QUIETLY: dict[str, Any] = {"namespace": "gcml", "log_to_driver": False, "logging_level": logging.ERROR}


@dataclass(frozen=True)
class Node:
    """What one living node offers."""

    name: str
    cpus: float
    gpus: float
    labels: Mapping[str, str]


@contextmanager
def connected(resources: ResourcesConfig) -> Iterator[str]:
    """A connection to Ray for the length of a block; a cluster that was started here ends with it.

    Inside another such block it is the same connection.

    Yields:
        Where we are connected, in words.

    Raises:
        ClusterError: the address cannot be reached.
    """
    global _WHERE  # noqa: PLW0603 - as Ray's own connection, one for the process
    if ray.is_initialized():
        yield _WHERE or f"the cluster at {ray.get_runtime_context().gcs_address}"
        return
    _WHERE = _connect(resources.address)
    try:
        yield _WHERE
    finally:
        _leave()
        _WHERE = ""


@contextmanager
def joined(address: str) -> Iterator[str]:
    """A connection to a cluster that runs already, for the length of a block; starts nothing.

    Yields:
        Where we are connected, in words; empty where a run would start a cluster of its own.

    Raises:
        ClusterError: the address cannot be reached.
    """
    wanted = _wanted(address)
    description = ""
    if wanted == "auto" and _join():
        description = f"the running cluster at {ray.get_runtime_context().gcs_address}"
    elif wanted not in ("auto", "local"):
        description = _connect(wanted)
    try:
        yield description
    finally:
        _leave()


def _wanted(address: str) -> str:
    """The address that is meant: with ``auto`` that of ``RAY_ADDRESS``, where it names one."""
    return (os.environ.get("RAY_ADDRESS") or "auto") if address == "auto" else address


def _connect(address: str) -> str:
    """Joins the cluster at ``address``; with ``auto`` the running one, or else a new local one."""
    wanted = _wanted(address)
    if wanted in ("auto", "local"):
        if wanted == "auto" and _join():
            return f"the running cluster at {ray.get_runtime_context().gcs_address}"
        os.environ.pop("RAY_ADDRESS", None)
        os.environ.setdefault(FREE_PERIOD, FREE_PERIOD_MS)
        try:
            _init("local", include_dashboard=False, resources={OWN: 1})
        except Exception as error:  # ray raises OSError, RuntimeError, or nothing more special
            raise ClusterError(f"Ray cannot start a cluster here: {error}{_start_remedy(error)}") from error
        return f"a local cluster with {sum(node.cpus for node in nodes()):g} CPUs, started for this run"
    _check_reachable(wanted)
    try:
        _init(wanted)
    except Exception as error:  # ray raises ConnectionError, RuntimeError, AuthenticationError...
        raise ClusterError(_cannot_join(wanted, str(error))) from error
    return f"the cluster at {wanted}"


def _start_remedy(error: Exception) -> str:
    """What to do where a cluster does not start."""
    words = str(error)
    if "AF_UNIX" in words:
        return "; set RAY_TMPDIR to a shorter folder, such as /tmp"
    if isinstance(error, OSError):
        return f"; set HOME to a folder that this user can write in, it is {Path.home()}" if ".ray" in words else ""
    return (
        "\nThe machine may be overloaded, or its limits (ulimit -a) too low for Ray; its own logs are in "
        f"{os.environ.get('RAY_TMPDIR', '/tmp')}/ray/session_latest/logs. resources.pool=local needs no Ray"  # noqa: S108
    )


def _init(address: str, **options: Any) -> None:
    """``ray.init``, which takes SIGTERM for itself even where the caller has a handler, without that."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, **options, **_QUIETLY)
    except SystemExit as error:  # Ray's own answer to SIGTERM
        raise KeyboardInterrupt from error
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _join() -> bool:
    """Joins a cluster that runs on this machine, if there is one that does not belong to another run.

    Ray keeps the address of the last one in a file, also after its end by a crash, and would wait for it for minutes;
    its public interface does not tell the address without joining.
    """
    try:
        address = canonicalize_bootstrap_address("auto")
    except ConnectionError:
        return False
    try:
        _knock(str(address))
    except OSError as error:
        log.warning("nothing answers at %s, the last known cluster (%s): going on without it", address, error)
        return False
    try:
        _init("auto")
    except ConnectionError:
        return False
    except Exception as error:
        raise ClusterError(_cannot_join("auto", str(error))) from error
    if OWN in ray.cluster_resources():  # type: ignore[no-untyped-call]
        _leave()
        return False
    return True


def _leave() -> None:
    """``ray.shutdown``, during which no other thread collects garbage.

    Tracebacks of failed calls hold references of Ray's in cycles. One that is dropped by another thread while Ray shuts
    down ends the whole process (Ray 2.60: "The core worker has already been shutdown").
    """
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        if collects:
            gc.enable()


def _check_reachable(address: str) -> None:
    """Fails in seconds where Ray would keep trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(f"Ray address {address!r} is not host:port; mend RAY_ADDRESS or resources.address")
    try:
        _knock(f"{host}:{port}")
    except OSError as error:
        raise ClusterError(_cannot_join(address, str(error))) from error


def _knock(address: str) -> None:
    """Whether anything answers at host:port; raises OSError where nothing does."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=REACH_TIMEOUT_S).close()


def _cannot_join(address: str, reason: str) -> str:
    return (
        f"cannot join the Ray cluster at {address} ({reason}). Check that `ray start --head` runs there and that "
        "RAY_ADDRESS (or resources.address) is right; with token authentication every shell needs "
        "RAY_AUTH_MODE=token and the cluster's token; resources.address=local starts a cluster of its own"
    )


def nodes() -> tuple[Node, ...]:
    """The living nodes of the connected cluster."""
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]  # Ray has no hints here
    return tuple(
        Node(
            name=str(node["NodeManagerHostname"]),
            cpus=float(node["Resources"].get("CPU", 0)),
            gpus=float(node["Resources"].get("GPU", 0)),
            labels=dict(node.get("Labels", {})),
        )
        for node in found
        if node["Alive"]
    )


def places(resources: ResourcesConfig) -> tuple[Node, ...]:
    """What sites may use: the bundles of the placement group that we run in, or else the nodes of the cluster.

    Labels are the nodes' own, so with label placement it is always the nodes.
    """
    group = get_current_placement_group()
    if group is None or resources.placement == "label":
        return nodes()
    return tuple(
        Node(f"bundle {index}", float(bundle.get("CPU", 0)), float(bundle.get("GPU", 0)), {})
        for index, bundle in enumerate(group.bundle_specs)
    )


def check_capacity(resources: ResourcesConfig, sites: Sequence[str], available: Sequence[Node]) -> None:
    """Whether every site has a place; what does not fit would otherwise wait for ever.

    Args:
        resources: what each site asks for, and where it must run.
        sites: names of the sites.
        available: the nodes of the cluster.

    Raises:
        ClusterError: it names what was asked, what there is, and the setting to change.
    """
    if resources.placement == "label":
        _check_labels(resources, sites, available)
        return
    room = _room(available, cpus=resources.cpus_per_site, gpus=resources.gpus_per_site)
    num_actors = resources.num_actors(len(sites))
    if room >= num_actors:
        return
    cpus, gpus = sum(node.cpus for node in available), sum(node.gpus for node in available)
    unit = "site" if resources.sites_per_actor == 1 else "actor"
    raise ClusterError(
        f"{described(resources, len(sites))} do not fit: the cluster has {cpus:g} CPU and {gpus:g} GPU on "
        f"{len(available)} node(s), room for {room} {unit}(s). " + _advice(resources, len(sites), available)
    )


def described(resources: ResourcesConfig, num_sites: int) -> str:
    """What so many sites ask for, in words."""
    each = f"({resources.cpus_per_site:g} CPU, {resources.gpus_per_site:g} GPU)"
    if resources.sites_per_actor == 1:
        return f"{num_sites} sites x {each}"
    return f"{num_sites} sites in {resources.num_actors(num_sites)} actors x {each}"


def num_that_fit(resources: ResourcesConfig, sites: Sequence[str], available: Sequence[Node]) -> int:
    """How many federations of these sites fit beside each other on the empty cluster; a server asks for nothing."""
    cpus, gpus = resources.cpus_per_site, resources.gpus_per_site
    if resources.placement != "label":
        return _room(available, cpus=cpus, gpus=gpus) // resources.num_actors(len(sites))
    own = ([node for node in available if node.labels.get(resources.label_key) == site] for site in sites)
    return min(_room(nodes_of_site, cpus=cpus, gpus=gpus) for nodes_of_site in own)


def _advice(resources: ResourcesConfig, num_sites: int, available: Sequence[Node]) -> str:
    """The largest shares, in hundredths, that would fit on what there is, and for a simulation fewer actors."""
    cpus, gpus = resources.cpus_per_site, resources.gpus_per_site
    room = _room(available, cpus=cpus, gpus=gpus)
    hint = f"for a simulation --set resources.sites_per_actor={-(-num_sites // room)}, " if room else ""
    num_actors = resources.num_actors(num_sites)
    num_gpus = sum(int(node.gpus) for node in available)
    if sum(_places_by_gpu(node, gpus) for node in available) < num_actors:
        gpus = int(100 / math.ceil(num_actors / num_gpus)) / 100 if num_gpus else 0.0
    shares = (hundredths / 100 for hundredths in range(round(cpus * 100), 0, -1))
    cpus_that_fit = next((share for share in shares if _room(available, cpus=share, gpus=gpus) >= num_actors), None)
    if cpus_that_fit is None:
        return "Start nodes that can hold them"
    advice = [f"--set resources.cpus_per_site={cpus_that_fit:g}"] if cpus_that_fit < cpus else []
    advice += [f"--set resources.gpus_per_site={gpus:g}"] if gpus < resources.gpus_per_site else []
    return f"Add nodes, {hint}or use " + " ".join(advice)


def _room(available: Sequence[Node], *, cpus: float, gpus: float) -> int:
    """How many sites that ask for this much fit on all nodes together."""
    return sum(min(int(node.cpus / cpus + 1e-9), _places_by_gpu(node, gpus)) for node in available)


def _places_by_gpu(node: Node, gpus: float) -> int:
    """How many sites the GPUs of a node can hold. Only whole sites share a GPU: 0.6 + 0.6 needs two.

    A bundle of a placement group may be a part of a GPU.
    """
    if gpus == 0:
        return sys.maxsize
    if gpus < 1:
        return int(node.gpus) * int(1 / gpus + 1e-9) + int(node.gpus % 1 / gpus + 1e-9)
    return int(node.gpus / gpus + 1e-9)


def _check_labels(resources: ResourcesConfig, sites: Sequence[str], available: Sequence[Node]) -> None:
    """Every site needs a living node of its own label that can hold it."""
    problems = []
    for site in sites:
        own = [node for node in available if node.labels.get(resources.label_key) == site]
        if not own:
            problems.append(f"no living node has the label {resources.label_key}={site}")
        elif not _room(own, cpus=resources.cpus_per_site, gpus=resources.gpus_per_site):
            problems.append(
                f"the node of {site} has {own[0].cpus:g} CPU and {own[0].gpus:g} GPU, "
                f"{resources.cpus_per_site:g} and {resources.gpus_per_site:g} are asked for"
            )
    if problems:
        present = sorted(node.labels[resources.label_key] for node in available if resources.label_key in node.labels)
        raise ClusterError(
            "; ".join(problems) + f". Labels there are: {present or 'none'}. Start a site's node with "
            f'`ray start --address=HEAD:6379 --labels="{resources.label_key}=SITE"`, '
            "or set resources.placement=none to run anywhere"
        )
