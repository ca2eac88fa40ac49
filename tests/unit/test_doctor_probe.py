"""What the doctor measures at one site of each kind before a run."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from gcml_ray.config import Config
from gcml_ray.data.datalist import Case, read_datalist
from gcml_ray.data.site_data import SiteData
from gcml_ray.doctor import probe
from tests.tiny_federation import make_federation


def first_case(config: Config) -> Case:
    return read_datalist(config.data.datalist)[0]


def test_a_method_without_mutual_steps_measures_local_ones_only(tmp_path: Path) -> None:
    config = make_federation(tmp_path, method={"name": "local"})
    data, loading = probe.read_first_case(config, first_case(config))
    found = probe.measure_site(config, data, loading=loading, scratch=tmp_path)
    assert set(found.losses) == {"segmentation"}
    assert found.costs.mutual_step_s == found.costs.local_step_s


@pytest.mark.parametrize("cpus", [1.0, 2.0])
def test_the_probe_has_as_many_threads_as_a_site_and_leaves_them_and_the_random_state_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpus: float
) -> None:
    """Reading a case and scoring it as well: with more threads than cores either may take ten times as long."""
    config = make_federation(tmp_path, resources={"cpus_per_site": cpus})
    seen: dict[str, int] = {}

    def watch(where: Any, name: str) -> None:
        plain = getattr(where, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            seen[name] = torch.get_num_threads()
            return plain(*arguments, **options)

        monkeypatch.setattr(where, name, watched)

    watch(SiteData, "load")
    watch(probe, "local_step")
    watch(probe, "score_case")
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    data, loading = probe.read_first_case(config, first_case(config))
    probe.measure_site(config, data, loading=loading, scratch=tmp_path)
    assert seen == dict.fromkeys(("load", "local_step", "score_case"), int(cpus))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_the_peak_of_memory_is_seen_after_it_was_given_back() -> None:
    """64 MB are touched and freed inside the block; memory kept from other tests is given back before."""
    ctypes.CDLL(None).malloc_trim(0)
    with probe._peak(torch.device("cpu")) as grown:
        torch.ones(16 * 2**20).sum()
    assert 60 * 2**20 < grown[0] < 90 * 2**20
