"""What a receiver says of a push."""

from __future__ import annotations

from typing import Any

from gcml_ray.push.inbox import Inbox
from gcml_ray.push.wire import Expectation


def refusal(header: Any, payload: Any, expected: Expectation) -> str:
    """Why an inbox without signatures and encodings refuses a push; empty where it takes it."""
    vector = Inbox().read(header, payload, expected)
    return vector if isinstance(vector, str) else ""
