"""A Ray cluster of two raylets on this machine for the soak, kept over its episodes: what it runs, and what is left.

Its tokens, files and sockets are its own, so no other cluster of the machine is touched or joined.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_ENABLE_AUTO_CONNECT": "0"}

import ray
from ray._private import internal_api
from ray._private.state import actors as all_actors
from ray.cluster_utils import Cluster as RayCluster
from ray.util.placement_group import placement_group_table

STORE_BYTES = 100 * 2**20
CPUS = 2  # logical, of each node: either can hold all sites
# Of the head: a node that dies is noticed within about four seconds.
HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 4,
}
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - not a temporary file of ours: it is searched for those left behind
OURS = ("plasma", "ray", "torch_", "psm_", "sem.mp-")  # names that Ray, torch and multiprocessing give; not loky's


class Cluster:
    """A head and a second node; this process is connected to it, to look at actors and to send pushes.

    Args:
        labels: a further node for each of these values of the label ``site``; by default one without a label.
    """

    def __init__(self, labels: tuple[str, ...] = ("",)) -> None:
        self.labels = labels
        self.folder = tempfile.mkdtemp(prefix="gcs")  # short: the path of a socket lies in it
        os.environ["RAY_TMPDIR"] = self.folder
        self.nodes: dict[str, Any] = {}
        self.start()

    def start(self) -> None:
        """Starts head and nodes."""
        options: dict[str, Any] = {"num_cpus": CPUS, "include_dashboard": False, "object_store_memory": STORE_BYTES}
        self.cluster = RayCluster(initialize_head=True, head_node_args=options | {"_system_config": HEALTH})
        for label in self.labels:
            self.add_node(label)
        self.cluster.wait_for_nodes()
        ray.init(self.cluster.address, namespace="gcml", log_to_driver=False, logging_level=logging.CRITICAL)

    @property
    def environment(self) -> Mapping[str, str]:
        """What a command needs in order to join."""
        return {"RAY_ADDRESS": str(self.cluster.address)}

    # --- faults ------------------------------------------------------------------------------

    def lose_node(self, label: str = "") -> None:
        """SIGKILL to a raylet, the head's excepted; what ran there ends with it."""
        self.cluster.remove_node(self.nodes.pop(label), allow_graceful=False)

    def add_node(self, label: str = "") -> None:
        """A node joins, or is back."""
        labels: dict[str, Any] = {"labels": {"site": label}} if label else {}
        self.nodes[label] = self.cluster.add_node(num_cpus=CPUS, object_store_memory=STORE_BYTES, **labels)

    def kill_all(self) -> None:
        """SIGKILL to all of it, as where the machine loses its power."""
        ray.shutdown()
        for node in list(self.cluster.worker_nodes):
            self.cluster.remove_node(node, allow_graceful=False)
        head: Any = self.cluster.head_node
        head.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)

    def shutdown(self) -> None:
        """Ends it and removes its files."""
        ray.shutdown()
        self.cluster.shutdown()  # type: ignore[no-untyped-call]
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- what is there -----------------------------------------------------------------------

    def sites(self) -> dict[str, int]:
        """The process of each site that is alive."""
        found = (actor for actor in all_actors().values() if str(actor["Name"]).startswith("site/"))
        return {str(actor["Name"]).split("/")[1]: int(actor["Pid"]) for actor in found if actor["State"] == "ALIVE"}

    def actor_of(self, site: str) -> tuple[Any, str]:
        """The living actor of a site, and the id of its run.

        Raises:
            ValueError: there is none now.
        """
        for actor in all_actors().values():
            name = str(actor["Name"])
            if name.startswith(f"site/{site}/") and actor["State"] == "ALIVE":
                return ray.get_actor(name, namespace="gcml"), name.split("/")[2]
        raise ValueError(f"site {site} has no living actor")

    def plasma_bytes(self) -> int:
        """What lies in the object stores of all nodes."""
        total = 0
        for node in ray.nodes():  # type: ignore[no-untyped-call]  # Ray has no hints here
            if node["Alive"]:
                address = {key: node[name] for key, name in _ADDRESS.items()}
                stats = internal_api.node_stats(**address, include_memory_info=False)  # type: ignore[no-untyped-call]
                total += int(stats.store_stats.object_store_bytes_used)
        return total

    def leaks(self, seen: set[int]) -> str:
        """What an episode has left behind after a while; empty where nothing is.

        Args:
            seen: processes that were sites.
        """
        problems = []
        if left := _still(lambda: [name for name in map(_alive_name, all_actors().values()) if name]):
            problems.append(f"actors {left}")
        if left := _still(lambda: [pid for pid in sorted(seen) if _is_site(pid)]):
            problems.append(f"processes {left}")
        if left := _still(self.plasma_bytes):
            problems.append(f"{left} bytes in the object store")
        groups = _still(lambda: [group for group in placement_group_table().values() if group["state"] != "REMOVED"])
        if groups:
            problems.append(f"{len(groups)} placement groups")
        if left := _still(orphans_in_shared_memory):
            problems.append(f"in {SHARED_MEMORY} {left}")
        return "left behind: " + ", ".join(problems) if problems else ""


_ADDRESS = {"node_manager_address": "NodeManagerAddress", "node_manager_port": "NodeManagerPort"}


def _alive_name(actor: Mapping[str, Any]) -> str:
    return "" if actor["State"] == "DEAD" else str(actor["Name"])


def _still(look: Callable[[], Any], *, timeout_s: float = 15.0) -> Any:
    """What is there even after a while; deaths take a moment to be known."""
    until = time.monotonic() + timeout_s
    while (found := look()) and time.monotonic() < until:
        time.sleep(0.3)
    return found


def _is_site(pid: int) -> bool:
    """Whether a process is there and still a site's."""
    try:
        return b"ray::Site" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def orphans_in_shared_memory() -> list[str]:
    """Files in shared memory, made since this process began, that no process has open or mapped."""
    began = Path(f"/proc/{os.getpid()}").stat().st_mtime
    names = {path.name for path in SHARED_MEMORY.iterdir() if path.name.startswith(OURS) and _made_after(path, began)}
    if not names:
        return []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            used = (process / "maps").read_text(errors="replace")
            used += " ".join(os.readlink(link) for link in (process / "fd").iterdir())
        except OSError:
            continue
        names -= {name for name in names if f"{SHARED_MEMORY}/{name}" in used}
    return sorted(names)


def _made_after(path: Path, began: float) -> bool:
    try:
        return path.stat().st_ctime > began
    except OSError:
        return False
