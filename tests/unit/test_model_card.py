"""What the card of an exported model says, and what it must not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gcml_ray.errors import CheckpointError
from gcml_ray.export.model import Source, export_safetensors, open_source
from gcml_ray.files.model_card import CARD_FILE, read_card
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.prediction.load import load_model
from gcml_ray.records import CaseScore, PushReceipt
from tests.made_up_run import made_up_round
from tests.model_files import write_run


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return open_source(write_run(tmp_path).output.folder, "A")


def test_an_exported_folder_names_no_path_of_the_federation(tmp_path: Path) -> None:
    place = "sqlite:////hospital/mlflow.db"
    run = write_run(
        tmp_path / "hospital",
        tracking={"uri": place},
        resources={"address": "10.0.0.1:6379"},
        data={"cache_folder": "/hospital/cache"},
    )
    export_safetensors(open_source(run.output.folder, "A"), tmp_path)
    text = (tmp_path / CARD_FILE).read_text()
    assert "hospital" not in text
    assert "10.0.0.1" not in text


def test_the_card_says_where_the_model_comes_from(tmp_path: Path, source: Source) -> None:
    export_safetensors(source, tmp_path)
    origin = read_card(tmp_path / CARD_FILE).provenance
    assert (origin.site, origin.round_number, origin.seed, origin.validation_dice) == ("A", 3, 7, 0.5)
    assert origin.data_contract == source.model.facts[0].data_contract
    assert set(origin.versions) == {"gcml-ray", "torch", "monai", "numpy"}


def test_the_card_names_the_peers_that_were_learnt_from_up_to_its_round(tmp_path: Path) -> None:
    """The model is that of round 3. In round 2 C's weights came in as well, and A's judge left them out."""
    config = write_run(tmp_path)
    run = RunFolder.open(config.output.folder)
    for number, peers in enumerate((("B",), ("B",), (), ("C",)), start=1):
        made_up = made_up_round(number, ("A", "B", "C"))
        (own,) = (report for report in made_up.trained if report.site == "A")
        pushes = tuple(PushReceipt(2, sender, "A", True, "", 100, 0.1) for sender in "BC") if number == 2 else ()
        run.append_round(replace(made_up, trained=(replace(own, peers=peers),), pushes=pushes))
    card = open_source(run.path, "A").card.provenance
    assert (card.peers, card.num_pushes) == (("B",), 2)


def test_the_card_of_a_pooled_model_has_the_dice_of_all_sites(tmp_path: Path) -> None:
    config = write_run(tmp_path, sites=("pooled",), method={"name": "pooled"})
    run = RunFolder.open(config.output.folder)
    run.write_cases(
        [CaseScore(site, "1", "test", "personalised", "x", dice, 1.0, 1.0) for site, dice in (("A", 0.5), ("B", 0.7))]
    )
    assert open_source(run.path, "pooled").card.provenance.test_dice == pytest.approx(0.6)


def test_a_card_that_is_cut_off_is_refused(tmp_path: Path, source: Source) -> None:
    export_safetensors(source, tmp_path)
    (tmp_path / CARD_FILE).write_text('{"format": 1')
    with pytest.raises(CheckpointError, match=r"model\.json is not the card of an exported model"):
        load_model(tmp_path)
