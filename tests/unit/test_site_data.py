import multiprocessing
import pickle
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from gcml_ray.config import DataConfig
from gcml_ray.data.datalist import Case
from gcml_ray.data.problems import CaseError, grouped
from gcml_ray.data.site_data import Batch, SiteData
from gcml_ray.errors import DataError, SiteError
from tests import loading_makers


def config(**changes: Any) -> DataConfig:
    return loading_makers.config(**({"batch_size": 2} | changes))


def make_cases(folder: Path, *, num_train: int = 5, site: str = "A") -> tuple[Case, ...]:
    """``num_train`` training cases, one validation and one test case; random 6x6x6 volumes."""
    random = np.random.default_rng(0)
    cases = []
    for index in range(num_train + 2):
        image, label = folder / f"{site}{index}.nii", folder / f"{site}{index}_seg.nii"
        nibabel.save(nibabel.Nifti1Image(random.normal(size=(6, 6, 6)).astype(np.float32), np.eye(4)), image)
        nibabel.save(nibabel.Nifti1Image(random.integers(0, 3, (6, 6, 6)).astype(np.uint8), np.eye(4)), label)
        split = "train" if index < num_train else "validation" if index == num_train else "test"
        cases.append(Case(site, f"c{index}", (str(image),), str(label), split))  # type: ignore[arg-type]
    return tuple(cases)


def loaded(cases: tuple[Case, ...], *, seed: int = 7, **changes: Any) -> SiteData:
    data = SiteData("A", cases, config(**changes), seed=seed)
    data.load()
    return data


def same(left: list[Batch], right: list[Batch]) -> bool:
    return all(
        torch.equal(a.image, b.image) and torch.equal(a.label, b.label) for a, b in zip(left, right, strict=True)
    )


def test_site_without_a_labelled_voxel_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cases = make_cases(tmp_path)
    loaded(cases)
    assert caplog.text == ""
    for case in cases:
        nibabel.save(nibabel.Nifti1Image(np.zeros((6, 6, 6), np.uint8), np.eye(4)), case.label)
    loaded(cases)
    assert "site A: none of its training cases has a labelled voxel" in caplog.text


@pytest.mark.parametrize("regions", [None, {"whole": ("a", "b")}])
def test_site_whose_validation_cases_are_empty_is_told_that_it_chooses_blindly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, regions: Any
) -> None:
    cases = make_cases(tmp_path)
    (validation,) = (case for case in cases if case.split == "validation")
    nibabel.save(nibabel.Nifti1Image(np.zeros((6, 6, 6), np.uint8), np.eye(4)), validation.label)
    loaded(cases, regions=regions)
    assert "none of its validation cases has a labelled voxel; it chooses its best model blindly" in caplog.text
    assert "training" not in caplog.text


def test_batches_have_the_promised_shapes(tmp_path: Path) -> None:
    (batch,) = loaded(make_cases(tmp_path)).batches(1, 1)
    assert (batch.image.shape, batch.image.dtype) == ((2, 1, 4, 4, 4), torch.float32)
    assert (batch.label.shape, batch.label.dtype) == ((2, 1, 4, 4, 4), torch.int64)


def test_region_labels_are_float_channels(tmp_path: Path) -> None:
    site = loaded(make_cases(tmp_path), regions={"whole": ("a", "b"), "core": ("b",)})
    (batch,) = site.batches(1, 1)
    assert (batch.label.shape, batch.label.dtype) == ((2, 2, 4, 4, 4), torch.float32)
    assert set(batch.label.unique().tolist()) <= {0.0, 1.0}


def test_resuming_at_any_round_gives_the_same_batches(tmp_path: Path) -> None:
    cases = make_cases(tmp_path)
    whole, resumed = loaded(cases), loaded(cases)
    rounds = {number: list(whole.batches(number, 3)) for number in (1, 2, 3, 4)}
    for number in (4, 2):
        assert same(list(resumed.batches(number, 3)), rounds[number])
    assert not same(rounds[1], rounds[2])


def test_workers_cut_the_same_patches_whether_a_round_was_whole_or_broken_off(tmp_path: Path) -> None:
    cases = make_cases(tmp_path)
    alone, helped = loaded(cases), loaded(cases, num_workers=2)
    random_state = torch.get_rng_state()
    assert same(list(helped.batches(1, 3)), list(alone.batches(1, 3)))
    assert torch.equal(torch.get_rng_state(), random_state)  # which a network's dropout goes on from
    next(helped.batches(2, 5))
    assert same(list(helped.batches(4, 3)), list(alone.batches(4, 3)))


def test_after_a_workers_death_the_next_round_has_new_ones(tmp_path: Path) -> None:
    """In a thread, as a site trains: there nothing but looking tells that a process has ended between two rounds."""
    cases = make_cases(tmp_path)
    alone, helped = loaded(cases), loaded(cases, num_workers=1)

    def lose_a_worker() -> list[Batch]:
        list(helped.batches(1, 2))
        for process in multiprocessing.active_children():
            process.kill()
        with pytest.raises(SiteError, match=r"site A, round 2.*data\.num_workers failed"):
            list(helped.batches(2, 3))
        return list(helped.batches(3, 3))

    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(lose_a_worker).result(timeout=120)
    assert same(found, list(alone.batches(3, 3)))


def test_order_of_the_datalist_does_not_matter(tmp_path: Path) -> None:
    cases = make_cases(tmp_path)
    assert same(list(loaded(cases).batches(1, 3)), list(loaded(cases[::-1]).batches(1, 3)))


def test_rounds_are_pieces_of_one_stream(tmp_path: Path) -> None:
    """Two rounds of 3 steps hold what one round of 6 steps holds."""
    site = loaded(make_cases(tmp_path))
    assert same([*site.batches(1, 3), *site.batches(2, 3)], list(site.batches(1, 6)))


def test_every_epoch_shows_each_training_case_once(tmp_path: Path) -> None:
    """5 cases, 5 steps of 2: two epochs. A patch as large as the volume, unchanged, is recognised by its sum."""
    still = {"flip_probability": 0.0, "intensity_probability": 0.0}
    site = loaded(make_cases(tmp_path), patch_size=(6, 6, 6), augment=still)
    seen = [float(image.double().pow(3).sum()) for batch in site.batches(1, 5) for image in batch.image]
    known = [float(sample.image.double().pow(3).sum()) for sample in site.split("train")]
    assert sorted(seen[:5]) == sorted(seen[5:]) == sorted(known)
    assert seen[:5] != seen[5:]


def test_seed_changes_the_batches(tmp_path: Path) -> None:
    cases = make_cases(tmp_path)
    assert not same(list(loaded(cases, seed=1).batches(1, 2)), list(loaded(cases, seed=2).batches(1, 2)))


def test_each_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = make_cases(tmp_path)
    reads: Counter[str] = Counter()
    load = nibabel.load
    monkeypatch.setattr(nibabel, "load", lambda path, *a, **k: (reads.update([str(path)]), load(path, *a, **k))[1])
    site = loaded(cases)
    list(site.batches(1, 6))
    assert reads == Counter({path: 1 for case in cases for path in (*case.images, case.label)})


def test_splits_and_counts_belong_to_the_site_alone(tmp_path: Path) -> None:
    site = loaded((*make_cases(tmp_path), *make_cases(tmp_path, site="B", num_train=2)))
    assert [site.num_cases(split) for split in ("train", "validation", "test")] == [5, 1, 1]
    assert [sample.case for sample in site.split("validation")] == ["c5"]
    assert len(site.split("train")) == 5


def test_num_bytes_counts_the_tensors(tmp_path: Path) -> None:
    """216 voxels: 4 bytes of image and 1 of label a case, and 4 of crop index a voxel in 5 training cases."""
    assert loaded(make_cases(tmp_path)).num_bytes == 216 * (7 * 5 + 5 * 4)


def test_all_bad_cases_of_a_site_are_in_one_error(tmp_path: Path) -> None:
    cases = make_cases(tmp_path)
    Path(cases[1].label).unlink()
    Path(cases[4].images[0]).write_bytes(b"x")
    with pytest.raises(
        DataError, match=r"(?s)site A: 2 of 7 cases are bad.*case A/c1.*no such file.*case A/c4.*not an image"
    ):
        loaded(cases)


def test_cases_with_the_same_problem_share_a_line(tmp_path: Path) -> None:
    cases = make_cases(tmp_path)
    with pytest.raises(DataError, match=r"^site A: all 7 cases, e\.g\. A/c0: the image has 1 channel\(s\)[^\n]*$"):
        loaded(cases, channels=("mr", "ct"))
    for case in cases[:6]:
        nibabel.save(nibabel.Nifti1Image(np.full((6, 6, 6), 7, np.uint8), np.eye(4)), case.label)
    with pytest.raises(DataError, match=r"^site A: 6 of 7 cases \(A/c0, A/c1, A/c2, A/c3, A/c4 and 1 more\): label"):
        loaded(cases)


def test_problems_that_differ_in_paths_and_shapes_alone_share_a_line(tmp_path: Path) -> None:
    first, second, third = make_cases(tmp_path)[:3]
    problems = [
        (first, f"label {first.label} has the shape (6, 6, 5)"),
        (second, f"label {second.label} has the shape (6, 6, 4)"),
        (third, f"image {third.images[0]} has the shape (6, 6, 4)"),
    ]
    assert grouped(problems, 9) == [
        f"2 of 9 cases (A/c0, A/c1): label {first.label} has the shape (6, 6, 5)",
        f"case A/c2: image {third.images[0]} has the shape (6, 6, 4)",
    ]


def test_error_of_a_case_survives_pickling(tmp_path: Path) -> None:
    error = CaseError(make_cases(tmp_path)[0], ("it is torn", "it is wet"))
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - ours
    assert (str(again), again.problems) == (str(error), error.problems)


def test_progress_counts_cases(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    SiteData("A", make_cases(tmp_path, num_train=1), config(), seed=0).load(
        lambda done, total: calls.append((done, total))
    )
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_site_without_cases_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="site Z has no case"):
        SiteData("Z", make_cases(tmp_path), config(), seed=0).load()


def test_cases_need_a_split(tmp_path: Path) -> None:
    case = make_cases(tmp_path)[0]
    with pytest.raises(DataError, match="cases without a split: c0"):
        SiteData("A", (Case("A", "c0", case.images, case.label, None),), config(), seed=0).load()


def test_worker_whose_parent_is_gone_before_it_has_started_ends_by_itself() -> None:
    """Torch's own watch takes whoever is the parent by then, which is init and never ends."""
    code = "import os; from gcml_ray.data.patch_stream import _stream_in_worker as make; make([], None, 0, 'A', -1)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 1  # noqa: S603 - ours
