"""Where the trials of a search keep preprocessed cases: once a node, on its own disk, for the length of the search."""

from __future__ import annotations

import logging
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tune.trial_config import Search

log = logging.getLogger(__name__)

REMOVE_TIMEOUT_S = 20.0
NAME_FILE = "case_cache.txt"


def cache_folder(search: Search) -> str | None:
    """The folder on every node, one a search; None where the federation names one itself, which stays.

    Its name is random and stands in the search's folder alone, so that no other user of a node can make a folder of
    that name first.
    """
    if search.base.data.cache_folder is not None:
        return None
    file = search.folder / NAME_FILE
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.write_text(secrets.token_hex(8) + "\n", encoding="utf-8")
    return str(Path(tempfile.gettempdir()) / f"gcml-cases-{file.read_text(encoding='utf-8').strip()}")


@contextmanager
def removed_at_the_end(search: Search) -> Iterator[None]:
    """Removes a search's cache from every node, however the block ends; a killed driver's goes when it is resumed."""
    folder = cache_folder(search)
    try:
        yield
    finally:
        if folder is not None:
            _remove(folder)
            _remove_elsewhere(folder)
            (search.folder / NAME_FILE).unlink(missing_ok=True)  # others have seen the name: no resume has it again


def _remove(folder: str) -> None:
    """Removes this node's cache, which holds patients' images."""
    shutil.rmtree(folder, ignore_errors=True)


def _remove_elsewhere(folder: str) -> None:
    here = ray.get_runtime_context().get_node_id()
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]  # Ray has no hints here
    others = [node["NodeID"] for node in found if node["Alive"] and node["NodeID"] != here]
    task: Any = ray.remote(num_cpus=0)(_remove)
    calls = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(folder)
        for node in others
    ]
    if calls:
        _, late = ray.wait(calls, num_returns=len(calls), timeout=REMOVE_TIMEOUT_S)
        if late:
            log.warning("%d node(s) did not remove %s in time: remove it there by hand", len(late), folder)
