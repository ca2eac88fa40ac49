"""The example of what mutual learning compares: which voxels, and which case it shows."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gcml_ray.data.loading import Sample
from gcml_ray.errors import DataError
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.records import RoundRecord
from gcml_ray.report.page.write import write_report
from gcml_ray.report.regions import _compare, draw_regions
from tests.made_up_run import made_up_round
from tests.model_files import write_run


def sample_of(label: list[list[int]]) -> Sample:
    empty = torch.zeros(0, dtype=torch.int32)
    return Sample("x", torch.zeros(1, 2, 3), torch.tensor([label], dtype=torch.uint8), (1.0, 1.0), empty, empty)


def test_omega_is_split_by_whether_the_peer_is_right() -> None:
    """Six voxels. Omega: all where truth, learner or peer is not 0; there the peer is right at (0, 0) and (0, 2)."""
    truth = [[1, 1, 0], [0, 0, 2]]
    learner = torch.tensor([[[0, 1, 1], [0, 0, 2]]])
    peer = torch.tensor([[[1, 0, 0], [0, 1, 1]]])
    compared = _compare(sample_of(truth), learner, peer, sigmoid=False)
    np.testing.assert_array_equal(compared.pull, [[True, False, True], [False, False, False]])
    np.testing.assert_array_equal(compared.push, [[False, True, False], [False, True, True]])


def taught_rounds(site: str, peer: str) -> tuple[RoundRecord, ...]:
    record = made_up_round(1, (site, peer))
    report = replace(record.trained[0], site=site, peers=(peer,), regions={"pull": 0.1, "push": 0.1, "omega": 0.2})
    return (replace(record, trained=(report,)),)


def test_example_is_a_validation_case_and_needs_no_test_file(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    cases = json.loads(Path(config.data.datalist).read_text())["cases"]
    own = {case["split"]: case for case in cases if case["site"] == "A"}
    for path in [*np.atleast_1d(own["test"]["image"]), own["test"]["label"]]:
        (tmp_path / str(path)).unlink()
    example = draw_regions(Path(config.output.folder), config, taught_rounds("A", "B"))
    assert own["validation"].get("case", Path(own["validation"]["label"]).name.partition(".")[0]) in example.title
    assert example.png.startswith(b"\x89PNG")


def test_page_goes_on_where_the_images_do_not_lie_here(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    folder = RunFolder(Path(config.output.folder))
    folder.append_round(taught_rounds("A", "B")[0])
    Path(config.data.datalist).unlink()
    page = write_report(folder.path).read_text(encoding="utf-8")
    assert re.search(r"There is no example picture: .*no such datalist", page)


def test_pair_without_its_models_has_no_example(tmp_path: Path) -> None:
    config = write_run(tmp_path, sites=("A",))
    with pytest.raises(DataError, match="two sites that learned from each other"):
        draw_regions(Path(config.output.folder), config, taught_rounds("A", "B"))
