"""What the sites of one process share, so that hundreds of them fit: networks, gradients, second learners.

A site that waits needs its weights, its optimiser's moments and its data; all else is needed only while it works, and
one site of a process works at a time. So the sites of a process have one network of each architecture, which is
pointed at the weights of the site whose turn it is, and one second learner for incoming models. Nothing is computed
otherwise than in a process of one's own: the weights stay where they are, only the network looks elsewhere.

What a site keeps can be parked until its next turn (``resources.park``): on a GPU weights and moments go to host
memory; with ``disk`` they and the images lie in files that are mapped into memory (:mod:`gcml_ray.training.parking`).

Legend: P values of parameters.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Concatenate, Literal, ParamSpec, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gcml_ray.data.site_data import SiteData
from gcml_ray.model.learner import Learner
from gcml_ray.model.weights import FlatModel
from gcml_ray.training.parking import Drawer, lasting_tensors, move
from gcml_ray.training.site_files import SiteFiles


class AtBench(Protocol):
    """What a workbench needs of a site."""

    bench: Workbench
    device: torch.device
    data: SiteData
    files: SiteFiles
    learners: tuple[Learner, ...]  # its own models; none before they are built


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Worker = TypeVar("Worker", bound=AtBench)


@dataclass
class _Body:
    """A network with its gradient, (P,), and the model whose weights it has now."""

    module: nn.Module
    gradient: Tensor
    owner: FlatModel


@dataclass(frozen=True)
class SecondLearner:
    """A learner for incoming models, with the initial values of what a push does not contain."""

    learner: Learner
    unsent: Tensor
    counters: dict[str, Tensor]

    @classmethod
    def of(cls, learner: Learner) -> SecondLearner:
        """From a learner that has just been built."""
        model = learner.model
        counters = {name: counter.clone() for name, counter in model.counters().items()}
        return cls(learner, model.flat[model.num_sent :].clone(), counters)

    def forget_unsent(self) -> None:
        """Resets what a push does not contain to its initial values, whichever model was here before."""
        model = self.learner.model
        model.flat[model.num_sent :].copy_(self.unsent)
        for name, counter in model.counters().items():
            counter.copy_(self.counters[name])


class Workbench:
    """What the sites of one process share: networks, gradients, and the turn to work, one site at a time.

    Args:
        park: where a site is kept between its turns; None leaves it where it works.

    Attributes:
        second: learners for incoming models, by architecture; see :mod:`gcml_ray.training.exchange`.
    """

    def __init__(self, park: Literal["memory", "disk"] | None = None) -> None:
        self.second: dict[str, SecondLearner] = {}
        self._park = park
        self._drawers: WeakKeyDictionary[AtBench, tuple[Drawer, Drawer]] = WeakKeyDictionary()
        self._bodies: dict[str, _Body] = {}
        self._turn = threading.Lock()

    def place(self, learner: Learner, role: str) -> Learner:
        """Makes the learner use the network that all learners of its role share; returns it.

        Args:
            learner: has just been built. The first one of a role brings the network along.
            role: tells apart what cannot share: other architectures, and models that work at the same time.
        """
        model = learner.model
        body = self._bodies.setdefault(role, _Body(model.module, model.gradient, model))
        if body.module is not model.module:
            model.settle(body.module, body.gradient)
        self._attach(model)
        return learner

    @contextmanager
    def turn(self, worker: AtBench) -> Iterator[None]:
        """Context in which the shared networks have this site's weights, and no other site of the process works."""
        with self._turn:
            for learner in worker.learners:
                has_moved = move(lasting_tensors(learner), worker.device)
                self._attach(learner.model, has_moved=has_moved)
            try:
                yield
            finally:
                if self._park is not None and worker.learners:
                    self._put_away(worker)

    def _attach(self, model: FlatModel, *, has_moved: bool = False) -> None:
        """Points the shared network at this model's weights, unless it is so already."""
        body = next(body for body in self._bodies.values() if body.module is model.module)
        if has_moved or body.owner is not model:
            model.attach()
            body.owner = model

    def _put_away(self, worker: AtBench) -> None:
        """Moves a site's tensors to where they wait for its next turn; they can be read and pushed there."""
        tensors = [tensor for learner in worker.learners for tensor in lasting_tensors(learner)]
        has_moved = move(tensors, torch.device("cpu"))
        if self._park == "disk":
            if worker not in self._drawers:
                self._drawers[worker] = Drawer(worker.files.folder), Drawer(worker.files.folder)
            models, images = self._drawers[worker]
            has_moved = models.keep(tensors) or has_moved
            images.keep(worker.data.tensors)
        if has_moved:
            for learner in worker.learners:
                self._attach(learner.model, has_moved=True)


def in_turn(
    method: Callable[Concatenate[Worker, Arguments], Result],
) -> Callable[Concatenate[Worker, Arguments], Result]:
    """Decorator of methods that work with a site's models: one site of a process at a time."""

    @functools.wraps(method)
    def taking_turns(self: Worker, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with self.bench.turn(self):
            return method(self, *args, **kwargs)

    return taking_turns
