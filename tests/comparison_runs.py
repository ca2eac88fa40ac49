"""Comparisons of three methods with fake trainers, and what watches them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.compare import Ending, Views, run_comparison
from gcml_ray.comparison.config import ComparisonConfig
from gcml_ray.config import Config
from gcml_ray.config.file import save_config
from tests.fakes import FakeTrainers, Fault, fake_config
from tests.runs import RecordingListener

METHODS: dict[str, dict[str, Any]] = {
    "local": {"method": {"name": "local"}},
    "gossip_avg": {"method": {"name": "gossip_avg", "topology": {"name": "ring"}}},
    "gcml": {},
}


@dataclass
class Watch:
    """Keeps which cells were shown; ``on_cell`` is told of each listener before its cell runs."""

    on_cell: Callable[[str, RecordingListener], object] = lambda *_: None
    stop: threading.Event = field(default_factory=threading.Event)
    is_aborted: threading.Event = field(default_factory=threading.Event)
    titles: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    @contextmanager
    def open_views(self, at_once: int) -> Iterator[Views]:
        del at_once
        yield Views(cell=self.cell, abort=self.is_aborted.set)

    @contextmanager
    def cell(self, title: str) -> Iterator[tuple[RecordingListener, threading.Event]]:
        self.titles.append(title)
        listener = RecordingListener(stop=self.stop)
        self.on_cell(title, listener)
        yield listener, self.stop


def make_comparison(folder: Path, *, seeds: tuple[int, ...] = (0,), **sections: Any) -> ComparisonConfig:
    save_config(fake_config(folder, **sections), folder / "base.yaml")
    return ComparisonConfig(
        name="fakes",
        base=str(folder / "base.yaml"),
        seeds=seeds,
        methods=METHODS,
        output=str(folder / "runs"),
        results=str(folder / "results"),
    )


def run(comparison: ComparisonConfig, watch: Watch | None = None, *faults: Fault, **options: Any) -> Ending:
    watch = watch or Watch()
    make_trainer = options.pop("make_trainer", FakeTrainers(faults))
    return run_comparison(
        comparison, [], open_views=watch.open_views, say=watch.lines.append, make_trainer=make_trainer, **options
    )


def break_gossip(config: Config, site: str, folder: Path, **options: Any) -> Any:
    """Trainers of the method gossip_avg cannot start."""
    faults = (Fault(site, 0, "start", "raise"),) if config.method.name == "gossip_avg" else ()
    return FakeTrainers(faults)(config, site, folder, **options)
