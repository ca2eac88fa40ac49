from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.local_pool import LocalTransport
from actors.site import NotStartedError, Site, StopRequestedError
from gcml_ray.errors import SiteError
from gcml_ray.push.wire import Buffer, PushHeader
from gcml_ray.records import Peer, TrainOrder, TrainReport
from tests.fakes import FakeTrainer, fake_config

ORDER = TrainOrder(round_number=1, phase="exchange", evaluate=False, checkpoint=True)
TIMEOUT_S = 60.0


class GatedTrainer(FakeTrainer):
    """Trains as long as the gate is closed; a step a millisecond."""

    gate = threading.Event()
    is_training = threading.Event()
    has_ended = threading.Event()

    def train_round(self, order: TrainOrder, pushes: Sequence[tuple[PushHeader, Buffer]]) -> TrainReport:
        self.on_progress("train", 1, 1000)
        self.is_training.set()
        step = 1
        while not self.gate.wait(0.001):
            step += 1
            self.on_progress("train", step, 1000)
        return super().train_round(order, pushes)


def make_sites(folder: Path, kind: Callable[..., Any] = FakeTrainer, names: str = "AB") -> dict[str, Site]:
    """Started sites which reach each other directly."""
    config = fake_config(folder, sites=tuple(names))

    def trainer(*arguments: Any, use_gpu: bool, **options: Any) -> FakeTrainer:
        del use_gpu
        made: FakeTrainer = kind(*arguments, num_values=8, **options)
        return made

    sites: dict[str, Site] = {}
    for name in names:
        sites[name] = Site(config, name, str(folder), run_id="run", use_gpu=False, make_trainer=trainer)
    for site in sites.values():
        site.start(LocalTransport(sites), tuple(names), 0)
    return sites


@contextmanager
def training(site: Site) -> Iterator[list[Exception]]:
    """A block during which a site trains in another thread; gives the error it ended with."""
    GatedTrainer.gate.clear()
    GatedTrainer.is_training.clear()
    GatedTrainer.has_ended.clear()
    errors: list[Exception] = []

    def work() -> None:
        try:
            site.train(ORDER)
        except Exception as error:  # handed to the test
            errors.append(error)
        finally:
            GatedTrainer.has_ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert GatedTrainer.is_training.wait(TIMEOUT_S)
    try:
        yield errors
    finally:
        GatedTrainer.gate.set()
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


def test_push_arrives_and_is_mixed_in_by_the_next_training(tmp_path: Path) -> None:
    sites = make_sites(tmp_path)
    (receipt,) = sites["A"].push(1, ("B",), TIMEOUT_S).receipts
    assert (receipt.accepted, receipt.sender, receipt.receiver, receipt.size_bytes) == (True, "A", "B", 8 * 4)
    assert sites["B"].train(ORDER).peers == ("A",)


def test_push_of_a_training_site_is_refused(tmp_path: Path) -> None:
    site = make_sites(tmp_path, GatedTrainer)["A"]
    with training(site), pytest.raises(SiteError, match="site A, round 1, push: asked for while the site trains"):
        site.push(1, ("B",), TIMEOUT_S)


def test_push_works_again_after_training(tmp_path: Path) -> None:
    sites = make_sites(tmp_path, GatedTrainer)
    with training(sites["A"]):
        pass
    assert sites["A"].push(1, ("B",), TIMEOUT_S).receipts[0].accepted


def test_push_works_again_after_a_push_that_failed(tmp_path: Path) -> None:
    class Broken(FakeTrainer):
        def export(self, run_id: str, round_number: int) -> tuple[PushHeader, Buffer]:
            if round_number == 1:
                raise OSError("no memory")
            return super().export(run_id, round_number)

    sites = make_sites(tmp_path, Broken)
    with pytest.raises(OSError, match="no memory"):
        sites["A"].push(1, ("B",), TIMEOUT_S)
    assert sites["A"].push(2, ("B",), TIMEOUT_S).receipts[0].accepted


def test_receive_answers_while_the_site_trains(tmp_path: Path) -> None:
    sites = make_sites(tmp_path, GatedTrainer)
    with training(sites["B"]) as errors:
        assert sites["A"].push(1, ("B",), TIMEOUT_S).receipts[0].accepted
        assert not GatedTrainer.gate.is_set()
    assert errors == []


def test_push_that_lands_during_training_waits_for_the_next_round(tmp_path: Path) -> None:
    sites = make_sites(tmp_path, GatedTrainer)
    with training(sites["B"]):
        sites["A"].push(2, ("B",), TIMEOUT_S)
    assert [header.sender for header, _ in sites["B"].mailbox.take()] == ["A"]


def test_push_forged_for_a_later_round_is_not_learnt_from_and_locks_nobody_out(tmp_path: Path) -> None:
    sites = make_sites(tmp_path)
    receipt = sites["A"].push(4, ("B",), TIMEOUT_S).receipts[0]
    assert receipt.accepted  # by its checks alone it could be: B may have missed rounds
    assert sites["B"].train(TrainOrder(1, "exchange", evaluate=False, checkpoint=False)).peers == ()
    assert sites["A"].push(2, ("B",), TIMEOUT_S).receipts[0].accepted
    assert sites["B"].train(TrainOrder(2, "exchange", evaluate=False, checkpoint=False)).peers == ("A",)


def test_stop_ends_training_at_its_next_step(tmp_path: Path) -> None:
    site = make_sites(tmp_path, GatedTrainer)["A"]
    with training(site) as errors:
        site.stop()
        assert GatedTrainer.has_ended.wait(TIMEOUT_S)
        assert not GatedTrainer.gate.is_set()
    assert [type(error) for error in errors] == [StopRequestedError]
    assert site.trainer is not None
    assert isinstance(site.trainer, FakeTrainer)
    assert site.trainer.round_number == 0


def test_status_shows_the_step_during_training_and_ready_after_it(tmp_path: Path) -> None:
    site = make_sites(tmp_path, GatedTrainer)["A"]
    with training(site):
        assert (site.status().stage, site.status().round_number, site.status().num_steps) == ("train", 1, 1000)
    assert (site.status().stage, site.status().round_number) == ("ready", 1)


def test_status_is_ready_again_after_training_that_failed(tmp_path: Path) -> None:
    site = make_sites(tmp_path, GatedTrainer)["A"]
    with training(site):
        site.stop()
        assert GatedTrainer.has_ended.wait(TIMEOUT_S)
        assert site.status().stage == "ready"


def test_receive_before_start_is_refused_not_raised(tmp_path: Path) -> None:
    site = Site(fake_config(tmp_path), "A", str(tmp_path), run_id="run", use_gpu=False)
    header, buffer = make_sites(tmp_path / "other")["B"].trainer.export("run", 1)  # type: ignore[union-attr]
    receipt = site.receive(header, buffer)
    assert (receipt.accepted, receipt.reason) == (False, "not ready: the receiver is starting")


def test_work_before_start_says_that_the_process_is_new(tmp_path: Path) -> None:
    """Ray replaces a process that died on its own; the driver must learn of it."""
    site = Site(fake_config(tmp_path), "A", str(tmp_path), run_id="run", use_gpu=False)
    with pytest.raises(NotStartedError, match="site A has a new process that was not started"):
        site.train(ORDER)


def test_sender_that_is_not_a_peer_is_refused(tmp_path: Path) -> None:
    sites = make_sites(tmp_path, names="AB")
    stranger = make_sites(tmp_path / "other", names="ABX")["X"]
    header, buffer = stranger.trainer.export("run", 1)  # type: ignore[union-attr]
    assert sites["A"].receive(header, buffer).reason == "sender: X is not a site of this run"


def test_rounds_of_a_peer_are_forgotten_when_it_has_a_new_process_or_has_left(tmp_path: Path) -> None:
    """Not where it is only introduced again, as happens when a third site comes back."""
    sites = make_sites(tmp_path)
    transport, first = LocalTransport(sites), {"A": Peer(num_train=5), "B": Peer(num_train=5)}
    sites["B"].register(transport, first)
    assert sites["A"].push(3, ("B",), TIMEOUT_S).receipts[0].accepted
    changes = (
        (first, "duplicate: round 3 of A has been here"),
        (first | {"A": Peer(num_train=5, incarnation=2)}, "duplicate: A has sent exactly this before its restart"),
    )
    for peers, reason in changes:
        sites["B"].register(transport, peers)
        assert sites["A"].push(3, ("B",), TIMEOUT_S).receipts[0].reason == reason
    sites["A"].trainer.weights = sites["A"].trainer.weights + np.float32(1)  # type: ignore[union-attr]
    assert sites["A"].push(2, ("B",), TIMEOUT_S).receipts[0].accepted
    sites["B"].register(transport, {"B": Peer(num_train=5)})
    sites["B"].register(transport, first)
    sites["A"].trainer.weights = sites["A"].trainer.weights + np.float32(1)  # type: ignore[union-attr]
    assert sites["A"].push(1, ("B",), TIMEOUT_S).receipts[0].accepted


def test_training_cases_are_those_that_the_driver_has_registered(tmp_path: Path) -> None:
    """The fake trainers of A and B have five each."""
    sites = make_sites(tmp_path)
    sites["B"].register(LocalTransport(sites), {"A": Peer(num_train=7), "B": Peer(num_train=5)})
    receipt = sites["A"].push(1, ("B",), TIMEOUT_S).receipts[0]
    assert receipt.reason == "num_train: 5, but A has registered 7 training cases"


def test_own_push_that_comes_back_is_refused(tmp_path: Path) -> None:
    site = make_sites(tmp_path)["A"]
    assert site.push(1, ("A",), TIMEOUT_S).receipts[0].reason == "sender: A is not a site of this run"


def test_training_never_writes_to_a_received_buffer(tmp_path: Path) -> None:
    sites = make_sites(tmp_path)
    header, buffer = sites["A"].trainer.export("run", 1)  # type: ignore[union-attr]
    sent = buffer.copy()
    sent.flags.writeable = False
    sites["B"].receive(header, sent)
    sites["B"].train(ORDER)
    np.testing.assert_array_equal(sent, buffer)


def test_garbage_in_place_of_a_header_gets_a_receipt(tmp_path: Path) -> None:
    receipt = make_sites(tmp_path)["A"].receive("hello", [1, 2])  # type: ignore[arg-type]
    assert (receipt.accepted, receipt.sender, receipt.reason) == (False, "?", "header: expected a PushHeader, got str")
