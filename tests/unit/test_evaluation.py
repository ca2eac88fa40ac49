from pathlib import Path

import pytest
import torch

from gcml_ray.training.evaluation import middle_of
from tests.makers import make_config
from tests.trainer_runs import make_trainer


def test_box_lies_around_the_middle_one_of_the_labelled_voxels() -> None:
    """Labelled: (2, 3), (6, 1), (6, 8), in this order; the middle one is (6, 1), the box from (4, -1): moved in."""
    label = torch.zeros(1, 10, 10)
    label[0, 2, 3] = label[0, 6, 1] = label[0, 6, 8] = 1
    assert middle_of(label, (4, 4)) == (slice(4, 8), slice(0, 4))


def test_box_holds_a_labelled_voxel_wherever_it_is_and_stays_inside() -> None:
    for corner in ((0, 0, 0), (11, 9, 7), (0, 9, 3)):
        label = torch.zeros(2, 12, 10, 8)
        label[1][corner] = 1
        box = middle_of(label, (8, 8, 8))
        assert label[:, *box].shape == (2, 8, 8, 8)
        assert label[:, *box].sum() == 1


def test_without_a_labelled_voxel_the_box_is_in_the_middle_and_no_larger_than_the_image() -> None:
    assert middle_of(torch.zeros(1, 10, 6), (4, 8)) == (slice(3, 7), slice(0, 8))
    assert torch.zeros(1, 10, 6)[:, *middle_of(torch.zeros(1, 10, 6), (4, 8))].shape == (1, 4, 6)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_where_the_patch_is_the_whole_image_its_dice_is_that_of_validation(tmp_path: Path, spatial_dims: int) -> None:
    """Images of the tiny federations are 16 x 16 or 12 x 12 x 8, padded to a patch that the network takes."""
    patch = {2: (16, 16), 3: (12, 12, 8)}[spatial_dims]
    trainer = make_trainer(make_config(tmp_path, spatial_dims=spatial_dims, data={"patch_size": patch}))
    dice = trainer.evaluator.patch_dice(trainer.local, 2)
    assert dice == pytest.approx(trainer.evaluator.validation_dice(trainer.local))
    assert 0 < dice < 1


def test_pictures_that_cannot_be_written_cost_no_scores(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(make_config(tmp_path, output={"num_overlays": 2}))
    trainer.overlays.parent.mkdir(parents=True, exist_ok=True)
    trainer.overlays.write_text("a file where a folder should be")
    trainer.files.advance(1, trainer.own, dice=0.5, is_best=True)
    trainer.files.save(trainer.local, trainer.personal)
    report = trainer.evaluate(split="test", model="personalised")
    assert report.scores
    assert "is not written (" in caplog.text


def test_only_the_first_cases_are_looked_at(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path))
    samples = trainer.data.split("validation")
    expected = trainer.evaluator.patch_dice(trainer.local, 1)
    trainer.data._samples["validation"] = (*samples, *trainer.data.split("test"))
    assert trainer.evaluator.patch_dice(trainer.local, 1) == expected
    assert trainer.evaluator.patch_dice(trainer.local, 2) != expected


def test_patches_that_could_change_nothing_are_left_out(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path))
    trainer.data._samples["validation"] = (*trainer.data.split("validation"), *trainer.data.split("test"))
    first, both = (trainer.evaluator.patch_dice(trainer.local, count) for count in (1, 2))
    assert first != both
    assert trainer.evaluator.patch_dice(trainer.local, 2, enough=0.49 * first) == first  # the other may be 0
    assert trainer.evaluator.patch_dice(trainer.local, 2, enough=0.51 * first) == both


@pytest.mark.parametrize("regions", [None, {"box": ("box",), "rare": ("rare",)}])
def test_classes_that_a_patch_does_not_show_count_neither_way(
    tmp_path: Path, regions: dict[str, tuple[str, ...]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No case shows "rare". A model that says background everywhere would have 1 for it, one stray voxel makes it 0."""
    labels = {"background": 0, "box": 1, "rare": 2}
    trainer = make_trainer(make_config(tmp_path, data={"labels": labels, "regions": regions}))
    box, rare = (0, 1) if regions else (1, 2)

    def dice_of(said: dict[int, float]) -> float:
        """Of a network whose last layer ignores its input."""
        logits = torch.full((2 if regions else 3,), -5.0)
        for channel, value in said.items():
            logits[channel] = value
        constant = logits.view(-1, 1, 1, 1)
        monkeypatch.setattr(trainer.evaluator, "_logits", lambda _, image, **__: constant.expand(-1, *image.shape[1:]))
        return trainer.evaluator.patch_dice(trainer.local, 1)

    everywhere = dice_of({box: 5.0})
    assert 0 < everywhere < 1
    assert dice_of({} if regions else {0: 5.0}) == 0.0
    if regions:
        assert dice_of({box: 5.0, rare: 5.0}) == everywhere


def test_patches_without_any_label_say_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path))
    for sample in trainer.data.split("validation"):
        sample.label.zero_()
    assert trainer.evaluator.patch_dice(trainer.local, 2) == 0.0
