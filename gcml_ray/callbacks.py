"""What a program hangs onto a run: objects with a method for each event that they care for.

A callback is any object with some of these methods; it needs no base class. All are called from the thread that
runs the federation, so a slow one slows the run down.

- ``on_connected(where)``: where the sites will live, in words: which cluster, or this process.
- ``on_start(config, sites)``: the sites are about to load their data.
- ``on_site_ready(info)``: a site is ready to train; a :class:`~gcml_ray.records.SiteInfo`.
- ``on_round_begin(plan)``: a round begins; a :class:`~gcml_ray.records.RoundPlan`.
- ``on_status(statuses)``: a :class:`~gcml_ray.records.SiteStatus` a site, about twice a second, of n > 20 sites every
  n / 40 seconds.
- ``on_site_trained(report)``: a site has finished its round; a :class:`~gcml_ray.records.TrainReport`.
- ``on_failure(failure, decision)``: a site failed; a :class:`~gcml_ray.records.SiteFailure`, and in ``decision.value``
  what is done about it.
- ``on_round_end(record)``: a round is over and on disk; a :class:`~gcml_ray.records.RoundRecord`.
- ``on_evaluated(report)``: a site has scored a model; a :class:`~gcml_ray.records.EvaluationReport`.
- ``on_end(status)``: the run is over: ``finished``, ``stopped`` or ``failed``.

An error in a callback is logged and does not stop the run; ``KeyboardInterrupt`` does.
"""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from gcml_ray.config import Config
from gcml_ray.console.clock import Clock
from gcml_ray.errors import ConfigError
from gcml_ray.prediction.averages import mean
from gcml_ray.records import EvaluationReport, RoundPlan, RoundRecord, SiteFailure, SiteInfo, SiteStatus, TrainReport

log = logging.getLogger(__name__)

EVENTS = (
    "on_connected",
    "on_start",
    "on_site_ready",
    "on_round_begin",
    "on_status",
    "on_site_trained",
    "on_failure",
    "on_round_end",
    "on_evaluated",
    "on_end",
)


class CallbackList:
    """Tells every callback what happens; to the driver it is one listener.

    Args:
        callbacks: objects with some of the methods of ``EVENTS``.

    Raises:
        ConfigError: a callback has a method ``on_...`` that is no event, or none that is one.
    """

    def __init__(self, callbacks: Sequence[object]) -> None:
        problems = [problem for callback in callbacks for problem in _problems(callback)]
        if problems:
            raise ConfigError(
                "\n".join([f"callbacks: {len(problems)} problem(s)", *(f"  {line}" for line in problems)])
            )
        self._callbacks = tuple(callbacks)
        self._has_raised: set[tuple[int, str]] = set()

    def on_connected(self, where: str) -> None:
        """Passed on."""
        self._tell("on_connected", where)

    def on_start(self, config: Config, sites: Sequence[str]) -> None:
        """Passed on."""
        self._tell("on_start", config, sites)

    def on_site_ready(self, info: SiteInfo) -> None:
        """Passed on."""
        self._tell("on_site_ready", info)

    def on_round_begin(self, plan: RoundPlan) -> None:
        """Passed on."""
        self._tell("on_round_begin", plan)

    def on_status(self, statuses: Sequence[SiteStatus]) -> None:
        """Passed on."""
        self._tell("on_status", statuses)

    def on_site_trained(self, report: TrainReport) -> None:
        """Passed on."""
        self._tell("on_site_trained", report)

    def on_failure(self, failure: SiteFailure, decision: Any) -> None:
        """Passed on."""
        self._tell("on_failure", failure, decision)

    def on_round_end(self, record: RoundRecord) -> None:
        """Passed on."""
        self._tell("on_round_end", record)

    def on_evaluated(self, report: EvaluationReport) -> None:
        """Passed on."""
        self._tell("on_evaluated", report)

    def on_end(self, status: str) -> None:
        """Passed on."""
        self._tell("on_end", status)

    def _tell(self, event: str, *arguments: object) -> None:
        """Calls every callback that has the event; the first error of each one is logged with its traceback."""
        for number, callback in enumerate(self._callbacks):
            method = getattr(callback, event, None)
            if method is None:
                continue
            try:
                method(*arguments)
            except Exception:
                if (number, event) not in self._has_raised:
                    self._has_raised.add((number, event))
                    log.exception(
                        "callback %s: %s raised; the run goes on, later errors of it are not logged", callback, event
                    )


def _problems(callback: object) -> list[str]:
    """What is wrong with a callback; a misspelt event would never be called."""
    name = type(callback).__name__
    if isinstance(callback, type):
        return [f"{callback.__name__} is a class: give an object, {callback.__name__}()"]
    methods = [each for each in dir(callback) if each.startswith("on_") and callable(getattr(callback, each))]
    if not set(methods) & set(EVENTS) and not set(methods) - set(EVENTS):
        return [f"{name} has no method of an event; events are {', '.join(EVENTS)}"]
    return [f"{name}.{each} is no event{_did_you_mean(each)}" for each in methods if each not in EVENTS]


def _did_you_mean(name: str) -> str:
    close = difflib.get_close_matches(name, EVENTS, n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else f"; events are {', '.join(EVENTS)}"


class Progress:
    """Shows a run as one line that is written anew; where nothing can be, as a line a round.

    Args:
        stream: where to write; standard output if None.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._is_live = self._stream.isatty() or "ipykernel" in sys.modules
        self._width = 0
        self._done = ""

    def on_start(self, config: Config, sites: Sequence[str]) -> None:
        """The sites are loading."""
        self._config, self._clock = config, Clock()
        self._show(f"{config.name}: {len(sites)} sites are loading")

    def on_failure(self, failure: SiteFailure, decision: Any) -> None:
        """A site failed: a line that stays."""
        what = f"{failure.site}, round {failure.round_number}, {failure.stage}: {failure.words} -> {decision.value}"
        self._show(what + "\n" * self._is_live)
        self._width = 0

    def on_round_end(self, record: RoundRecord) -> None:
        """A round is over."""
        self._clock.add(record)
        number, rounds = record.plan.round_number, self._config.federation.rounds
        dice = record.validation_dice.values()
        shown = f", validation Dice {mean(dice):.3f}" if dice else ""
        lost = f", {len(record.skipped)} site(s) skipped" if record.skipped else ""
        times = f"{self._clock.elapsed} gone, {self._clock.left(self._config, number)} left"
        self._done = f"{self._config.name}: round {number}/{rounds}"
        self._show(f"{self._done} {record.plan.phase}{shown}{lost} ({times})")

    def on_evaluated(self, report: EvaluationReport) -> None:
        """A site has been tested."""
        if self._is_live:
            self._show(f"{self._done}, tested {report.site} ({report.model})")

    def on_end(self, status: str) -> None:
        """The run is over."""
        self._show(f"{self._done or 'no round'}, {status}")
        if self._is_live:
            self._stream.write("\n")

    def _show(self, line: str) -> None:
        """Shows the line, in place of the one before where that is possible."""
        if self._is_live:
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()
