"""Where pushes wait until the site has time for them: the newest of each sender, never more than fit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from gcml_ray.push.inbox import Inbox
from gcml_ray.push.wire import Buffer, Expectation, PushHeader, malformed


class Mailbox:
    """Checks what arrives and keeps it; safe to use while the site trains in another thread.

    Args:
        capacity: how many senders' models may wait at a time (``method.max_incoming``). Each one pins a
            model-sized buffer in memory.
        inbox: checks, verifies and decodes what arrives; by default plain float32 without signatures.
        keeps_newest: whether a push that finds no room takes the place of the one that has waited longest, as fits
            rounds without a barrier; else it is refused.
        takes_again: whether a sender may send the same again, as a model does that comes to be scored once more.
    """

    def __init__(
        self, capacity: int, *, inbox: Inbox | None = None, keeps_newest: bool = False, takes_again: bool = False
    ) -> None:
        self.capacity = capacity
        self._inbox = inbox or Inbox()
        self._keeps_newest = keeps_newest
        self._takes_again = takes_again
        self._last_round: dict[str, int] = {}
        self._last_checksum: dict[str, str] = {}
        self._before_restart: dict[str, str] = {}
        self._lock = threading.Lock()
        self._waiting: dict[str, tuple[PushHeader, Buffer]] = {}

    def deliver(self, header: PushHeader, buffer: Any, *, expect: Callable[[str], Expectation]) -> str:
        """Takes a push, or says why not.

        Args:
            header: what the sender says of the buffer.
            buffer: what arrived; never written to, and not copied where it is plain float32.
            expect: the contract for a sender's pushes.

        Returns:
            The reason for a refusal; empty where the push was taken.
        """
        if problem := malformed(header):
            return problem
        vector = self._inbox.read(header, buffer, expect(header.sender))
        if isinstance(vector, str):
            return vector
        with self._lock:
            if reason := "" if self._takes_again else self._repetition(header):
                return reason
            if header.sender not in self._waiting and len(self._waiting) >= self.capacity:
                if not self._keeps_newest:
                    return f"mailbox full: max_incoming is {self.capacity}"
                del self._waiting[next(iter(self._waiting))]
            self._waiting.pop(header.sender, None)  # what is newest stands last
            self._waiting[header.sender] = (header, vector)
            self._last_round[header.sender] = header.round_number
            self._last_checksum[header.sender] = header.checksum
            self._before_restart.pop(header.sender, None)
            self._inbox.keep(header.sender, vector)
        return ""

    def _repetition(self, header: PushHeader) -> str:
        """Why a push is one that has been here; empty where it is new."""
        last = self._last_round.get(header.sender)
        if last is not None and last >= header.round_number:
            return f"duplicate: round {last} of {header.sender} has been here"
        if self._before_restart.get(header.sender) == header.checksum:
            del self._before_restart[header.sender]  # once: what a site that keeps its weights repeats is its last word
            return f"duplicate: {header.sender} has sent exactly this before its restart"
        return ""

    def forget(self, senders: Iterable[str]) -> None:
        """Forgets the last rounds of senders that have a new process: it may go on from an older checkpoint.

        Its first push may repeat the last one of its old process. So that checksum stays known, and such a push is
        refused here once, as a duplicate, before the judge would take it for a replay. Pushes that wait stay.
        """
        with self._lock:
            for sender in senders:
                if self._last_round.pop(sender, None) is not None:
                    self._before_restart[sender] = self._last_checksum.pop(sender)

    def take(self, *, newest_round: int | None = None) -> list[tuple[PushHeader, Buffer]]:
        """Empties the mailbox; in the order of senders' names, whatever order they came in.

        Args:
            newest_round: the round that all are in, where there is one. What claims to be of a later one is left out
                and forgotten: else it would keep its sender's true pushes out until then.
        """
        with self._lock:
            waiting, self._waiting = self._waiting, {}
            if newest_round is not None:
                waiting = {name: push for name, push in waiting.items() if push[0].round_number <= newest_round}
                self._last_round = {name: min(last, newest_round) for name, last in self._last_round.items()}
        return [waiting[sender] for sender in sorted(waiting)]
