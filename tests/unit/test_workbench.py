"""What sites of one process share: one network for many weights, turns, and tensors that wait on disk."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gcml_ray.config import OptimiserConfig
from gcml_ray.model.learner import Learner
from gcml_ray.model.precision import Precision
from gcml_ray.records import TrainOrder
from gcml_ray.training.parking import Drawer, lasting_tensors
from gcml_ray.training.trainer import SiteTrainer
from gcml_ray.training.workbench import SecondLearner, Workbench, in_turn
from tests.makers import make_config


def learner_of(value: float) -> Learner:
    """A line with slope and offset ``value``, and a BatchNorm behind it."""
    module = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    nn.init.constant_(module[0].weight, value)
    nn.init.constant_(module[0].bias, value)
    optimiser = OptimiserConfig(name="adam", learning_rate=0.1)
    return Learner(module, send_buffers=False, optimiser=optimiser, precision=Precision("cpu", "none"))


class Worker:
    """A site with one model, whose work is what a test gives it."""

    def __init__(self, bench: Workbench, value: float) -> None:
        self.bench = bench
        self.learner = bench.place(learner_of(value), "local")
        self.learners = (self.learner,)
        self.device = torch.device("cpu")

    @in_turn
    def work(self, task: Any) -> Any:
        return task()

    def line(self, x: float) -> float:
        """What the network's first layer makes of a number."""
        layer = self.learner.model.module[0]  # type: ignore[index]
        return float(layer(torch.tensor([[x]])).detach())


class Turn:
    """A lock that tells when somebody has found it taken."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.is_waited_for = threading.Event()

    def __enter__(self) -> None:
        if not self.lock.acquire(blocking=False):
            self.is_waited_for.set()
            self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


# --- one network -----------------------------------------------------------------------------------


def test_one_network_has_the_weights_of_whose_turn_it_is() -> None:
    """1 x 3 + 1 and 2 x 3 + 2."""
    bench = Workbench()
    one, two = Worker(bench, 1.0), Worker(bench, 2.0)
    assert one.learner.model.module is two.learner.model.module
    assert [worker.work(lambda worker=worker: worker.line(3.0)) for worker in (one, two, one)] == [4.0, 8.0, 4.0]


def test_a_step_changes_the_weights_of_whose_turn_it_is_alone() -> None:
    bench = Workbench()
    one, two = Worker(bench, 1.0), Worker(bench, 2.0)

    def step() -> None:
        one.learner.model.module.train()
        one.learner.apply_gradients(one.learner.forward(torch.tensor([[1.0], [2.0]]))[0].square().sum())

    before = two.learner.model.flat.clone()
    one.work(step)
    assert torch.equal(two.learner.model.flat, before)
    assert two.learner.model.counters()["1.num_batches_tracked"].item() == 0
    assert one.learner.model.counters()["1.num_batches_tracked"].item() == 1
    assert two.learner.optimiser.moments == {}


def test_models_that_work_at_the_same_time_have_networks_of_their_own() -> None:
    bench = Workbench()
    local, personal = bench.place(learner_of(1.0), "local"), bench.place(learner_of(1.0), "personal")
    assert local.model.module is not personal.model.module


def test_nobody_works_while_it_is_the_turn_of_another() -> None:
    bench = Workbench()
    bench._turn = turn = Turn()  # type: ignore[assignment]
    one, two = Worker(bench, 1.0), Worker(bench, 2.0)
    has_begun, may_end, other_worked = threading.Event(), threading.Event(), threading.Event()

    def wait() -> None:
        has_begun.set()
        may_end.wait(60)

    first = threading.Thread(target=one.work, args=(wait,))
    second = threading.Thread(target=two.work, args=(other_worked.set,))
    first.start()
    assert has_begun.wait(60)
    second.start()
    assert turn.is_waited_for.wait(60)
    assert not other_worked.is_set()
    may_end.set()
    assert other_worked.wait(60)
    first.join()
    second.join()


def test_second_learner_forgets_statistics_of_the_model_before() -> None:
    second = SecondLearner.of(learner_of(1.0))
    model = second.learner.model
    model.flat.fill_(7.0)
    model.counters()["1.num_batches_tracked"].fill_(5)
    second.forget_unsent()
    assert model.flat[model.num_sent :].tolist() == [0.0, 1.0]  # running mean and variance as built
    assert model.flat[: model.num_sent].eq(7.0).all()
    assert model.counters()["1.num_batches_tracked"].item() == 0


def test_a_push_during_a_round_without_a_barrier_leaves_the_models_in_training_alone(tmp_path: Path) -> None:
    config = make_config(tmp_path, spatial_dims=2, federation={"mode": "async"})
    seen: list[Any] = []

    def push(stage: str, *_: int) -> None:
        if stage == "train" and not seen:
            seen.append(trainer.local)
            trainer.export("run", 1)

    trainer = SiteTrainer(config, "A", tmp_path / "run", use_gpu=False, on_progress=push)
    trainer.start(resume_round=0)
    before = trainer.local.model.flat.clone()
    trainer.train_round(TrainOrder(1, "warmup", evaluate=False, checkpoint=False), ())
    assert seen == [trainer.local]
    assert not torch.equal(trainer.local.model.flat, before)


# --- on disk ---------------------------------------------------------------------------------------


def tensors() -> list[Tensor]:
    return [torch.arange(5.0), torch.arange(6, dtype=torch.uint8).view(2, 3), torch.ones(100)]


def test_tensors_in_a_drawer_keep_values_type_shape_and_identity(tmp_path: Path) -> None:
    kept = tensors()
    places = [one.data_ptr() for one in kept]
    assert Drawer(tmp_path).keep(kept)
    for one, original, place in zip(kept, tensors(), places, strict=True):
        assert torch.equal(one, original)
        assert one.dtype == original.dtype
        assert one.data_ptr() != place


def test_what_is_written_to_a_kept_tensor_is_there_after_the_next_time(tmp_path: Path) -> None:
    drawer, kept = Drawer(tmp_path), tensors()
    drawer.keep(kept)
    kept[0].add_(1)
    assert not drawer.keep(kept)
    assert kept[0].tolist() == [1, 2, 3, 4, 5]


def test_new_tensors_move_in_and_old_ones_stay_readable(tmp_path: Path) -> None:
    drawer, kept = Drawer(tmp_path), tensors()
    drawer.keep(kept)
    view = kept[0][2:]
    assert drawer.keep([*kept, torch.zeros(3)])
    assert view.tolist() == [2.0, 3.0, 4.0]


def test_a_drawer_leaves_no_file_behind(tmp_path: Path) -> None:
    Drawer(tmp_path / "site").keep(tensors())
    assert list((tmp_path / "site").iterdir()) == []


def test_a_kept_tensor_takes_no_memory_of_the_process(tmp_path: Path) -> None:
    """32 MB, of which less than 8 are resident after it was put away; reading it brings it back."""
    drawer, kept = Drawer(tmp_path), [torch.ones(8_000_000)]
    drawer.keep(kept)
    away = resident_bytes()
    assert kept[0].sum().item() == 8_000_000
    assert resident_bytes() - away > 24_000_000
    drawer.keep(kept)
    assert resident_bytes() - away < 8_000_000


def resident_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def test_weights_and_moments_last_and_gradients_do_not() -> None:
    learner = learner_of(1.0)
    learner.model.module.train()
    learner.apply_gradients(learner.forward(torch.tensor([[1.0], [2.0]]))[0].square().sum())
    flat, *moments = lasting_tensors(learner)
    assert flat is learner.model.flat
    assert [moment.numel() for moment in moments] == [4, 4]


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    with pytest.raises(OSError, match="No space left"):
        Drawer(tmp_path).keep(tensors())
