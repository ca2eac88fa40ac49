"""What Ray's errors say of a site, as failure records."""

from __future__ import annotations

from typing import Literal

import ray

from actors.site import NotStartedError
from gcml_ray.records import SiteFailure


def classify(error: ray.exceptions.RayError, *, site: str, stage: str, round_number: int) -> SiteFailure:
    """A Ray error as a failure record: the site raised, died, or cannot be reached for now."""
    cause = getattr(error, "cause", None) or error
    kind: Literal["raised", "died", "unreachable"] = "raised"
    if isinstance(error, ray.exceptions.ActorDiedError) or isinstance(cause, NotStartedError):
        kind = "died"
    elif isinstance(error, ray.exceptions.RayActorError):
        kind = "unreachable"
    words = str(cause) if cause is not error else _in_a_line(error)
    return SiteFailure(site, round_number, stage, kind, words or type(cause).__name__, type(cause).__name__, str(error))


def _in_a_line(error: ray.exceptions.RayError) -> str:
    """What a message of Ray says; of an actor that could not be built, the end of the traceback: why."""
    if isinstance(error, ray.exceptions.ActorUnavailableError):  # Ray gives the words of its transport here
        return "its process has ended, or cannot be reached"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"its process could not be set up: {lines[-1]}" if "creation task" in lines[0] else lines[0]
