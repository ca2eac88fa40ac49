"""The examples of ``docs/extending.md``, carried out as the page says: in a copy of the packages, then a run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml

from gcml_ray.files.run_folder import RunFolder
from tests.tiny_federation import SHAPE, write_image

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCK_YAML = re.compile(r"```yaml\n(.*?)```", re.DOTALL)
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
TITLE = re.compile(r"# (\S+\.py)\n")  # the first line of a block that is a whole file
PLACE = re.compile(r"(?:[Ii]n\s+`(?P<file>\S+\.py)`,|and) (?P<side>after|before) `(?P<anchor>[^`]+)`:\s*\Z")


@dataclass(frozen=True)
class Edit:
    """Lines to put before or after a line of a file."""

    file: str
    side: str
    anchor: str
    lines: str


def files_and_edits(page: str) -> tuple[dict[str, str], list[Edit]]:
    """Whole files by name, and edits; "and after ..." means the file of the edit before."""
    files: dict[str, str] = {}
    edits: list[Edit] = []
    for block in BLOCK.finditer(page):
        title = TITLE.match(block[1])
        if title:
            files[title[1]] = block[1][title.end() :]
            continue
        place = PLACE.search(page[: block.start()])
        assert place is not None, f"nothing says where this goes:\n{block[1]}"
        edits.append(Edit(place["file"] or edits[-1].file, place["side"], place["anchor"], block[1]))
    return files, edits


def apply(edit: Edit, root: Path) -> None:
    """Puts the lines where the page says."""
    path = root / edit.file
    text = path.read_text(encoding="utf-8")
    line = re.compile(rf"^{re.escape(edit.anchor)}.*\n", re.MULTILINE)
    assert len(line.findall(text)) == 1, f"{edit.file} has not one line {edit.anchor!r}"
    new = (lambda found: found[0] + edit.lines) if edit.side == "after" else (lambda found: edit.lines + found[0])
    path.write_text(line.sub(new, text), encoding="utf-8")


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages with everything that the page adds."""
    root = tmp_path_factory.mktemp("extended")
    for package in ("gcml_ray", "actors"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    files, edits = files_and_edits(PAGE)
    for name, text in files.items():
        (root / name).write_text(text, encoding="utf-8")
    for edit in edits:
        apply(edit, root)
    return root


def python(root: Path, *arguments: str) -> str:
    """What a program prints that is run among the copies."""
    run = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, *arguments], cwd=root, capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_page_has_three_files_and_says_where_every_other_line_goes() -> None:
    files, edits = files_and_edits(PAGE)
    assert sorted(files) == ["gcml_ray/methods/clipped_avg.py", "gcml_ray/networks/plain.py", "prepare_mine.py"]
    assert [Path(edit.file).name for edit in edits] == ["registry.py"] * 2 + ["methods.py"] * 2 + ["__init__.py"] * 2


def test_federation_of_the_pages_data_set_network_and_method_runs(extended: Path) -> None:
    for site in ("north", "south"):
        for index in range(5):
            folder = extended / "hospitals" / site / f"p{index}"
            folder.mkdir(parents=True)
            label = np.zeros(SHAPE, np.uint8)
            label[2:5, 2:5, 2:5] = 1
            rng = np.random.default_rng(index)
            for channel in ("t1", "flair"):
                write_image(folder / f"{channel}.nii.gz", rng.normal(size=SHAPE).astype(np.float32))
            write_image(folder / "seg.nii.gz", label)
    python(extended, "prepare_mine.py", "hospitals", "mine.json")
    config = {
        "name": "extended",
        "data": {"datalist": "mine.json", "channels": ["t1", "flair"], "labels": {"background": 0, "lesion": 1}},
        "network": {"name": "plain", "options": {"width": 4, "depth": 2}},
        "optimiser": {"learning_rate": 1e-3},
        "method": yaml.safe_load(BLOCK_YAML.search(PAGE)[1])["method"],  # type: ignore[index]
        "federation": {"rounds": 2, "local_steps": 2, "warmup_rounds": 0, "cooldown_rounds": 0},
        "resources": {"pool": "local"},
        "tracking": {"enabled": False},
        "output": {"folder": "run"},
    }
    config["data"] |= {"spacing_is_real": True, "patch_size": list(SHAPE)}  # type: ignore[operator]
    (extended / "c.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    python(extended, "-m", "gcml_ray", "run", "c.yaml")
    rounds = RunFolder(extended / "run").rounds()
    assert [report.merge for each in rounds for report in each.trained] == ["clipped"] * 4
    assert {score.site for score in RunFolder(extended / "run").cases()} == {"north", "south"}
    python(extended, "-m", "gcml_ray", "report", "run", "--no-images")
    assert "Gossip averaging with a bounded move" in (extended / "run" / "report.html").read_text(encoding="utf-8")


def test_example_method_moves_no_further_than_its_bound(extended: Path) -> None:
    """Own weights (3, 4) of length 5; the peer has 3 times the cases and lies 10 away, at (3, 14).

    Unclipped it moves 10 * 3/4 = 7.5 up; the bound 0.2 * 5 = 1 clips the way of 10 to 1, of which 3/4 are gone.
    """
    program = """
from types import SimpleNamespace as Some
import torch
from gcml_ray.config.methods import ClippedAvgMethod
from gcml_ray.methods import clipped_avg
from gcml_ray.methods.rounds import IncomingModel, RoundResult
flat = torch.tensor([3.0, 4.0])
model = Some(flat=flat, num_sent=2, mix=lambda other, own_share: flat.mul_(own_share).add_(other, alpha=1 - own_share))
clipped_avg.train_alone = lambda local, context: RoundResult()
method = ClippedAvgMethod.model_validate({"name": "clipped_avg", "topology": {"name": "ring"}, "max_move": 0.2})
peer = IncomingModel("B", 3, torch.tensor([3.0, 14.0]))
clipped_avg.train_round(Some(model=model), [peer], Some(num_train=1), method)
print([round(value, 4) for value in flat.tolist()])
"""
    assert python(extended, "-c", program).strip() == "[3.0, 4.75]"


def test_examples_pass_the_checks_of_the_repository(extended: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", extended)
    names = ["gcml_ray/methods/clipped_avg.py", "gcml_ray/networks/plain.py"]
    python(extended, "-m", "ruff", "format", "--check", *names)
    python(extended, "-m", "ruff", "check", *names, "gcml_ray/methods/__init__.py", "gcml_ray/networks/registry.py")
