"""Where pushes wait until the site has time for them: the newest of each sender, never more than fit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from gcml_ray.wire import Buffer, Expectation, PushHeader, refusal


class Mailbox:
    """Checks what arrives and keeps it; safe to use while the site trains in another thread.

    Args:
        capacity: how many senders' models may wait at a time (``method.max_incoming``). Each one pins a
            model-sized buffer in memory.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._waiting: dict[str, tuple[PushHeader, Buffer]] = {}

    def deliver(self, header: PushHeader, buffer: Any, *, expect: Callable[[str], Expectation]) -> str:
        """Takes a push, or says why not.

        Args:
            header: what the sender says of the buffer.
            buffer: what arrived; not copied, never written to.
            expect: the contract for a sender's pushes.

        Returns:
            The reason for a refusal; empty where the push was taken.
        """
        if not isinstance(header, PushHeader):
            return f"header: expected a PushHeader, got {type(header).__name__}"
        if not isinstance(header.sender, str):
            return f"header: sender must be a name, got {type(header.sender).__name__}"
        reason = refusal(header, buffer, expect(header.sender))
        if reason:
            return reason
        with self._lock:
            known = self._waiting.get(header.sender)
            if known is not None and known[0].round_number >= header.round_number:
                return f"duplicate: round {known[0].round_number} of {header.sender} is already here"
            if known is None and len(self._waiting) >= self._capacity:
                return f"mailbox full: max_incoming is {self._capacity}"
            self._waiting[header.sender] = (header, buffer)
        return ""

    def take(self) -> list[tuple[PushHeader, Buffer]]:
        """Empties the mailbox; in the order of senders' names, whatever order they came in."""
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        return [waiting[sender] for sender in sorted(waiting)]
