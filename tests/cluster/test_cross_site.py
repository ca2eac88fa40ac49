"""Models that travel to be scored, over Ray: the same scores as in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.local_pool import LocalPool
from actors.ray_pool import RayPool
from tests.makers import make_config
from tests.runs import drive

pytestmark = pytest.mark.usefixtures("ray_local")


def test_scores_across_sites_equal_those_of_the_local_pool(tmp_path: Path) -> None:
    tables = []
    for name, pool in (("ray", RayPool), ("local", LocalPool)):
        (tmp_path / name).mkdir()
        config = make_config(
            tmp_path / name,
            num_sites=3,
            spatial_dims=2,
            federation={"rounds": 2, "warmup_rounds": 0, "late_factor": None},
            evaluation={"cross_site": True},
        )
        run = drive(config, pool(config, config.output.folder, run_id="run"))
        assert run.failures() == []
        tables.append(run.folder.cross_site_file.read_text())
    assert len(tables[0].splitlines()) == 1 + 9, "3 models at 3 sites, one case and class each"
    assert tables[0] == tables[1]
