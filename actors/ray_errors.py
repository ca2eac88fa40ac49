"""What Ray's errors say of a site, as failure records."""

from __future__ import annotations

from typing import Literal

import ray

from actors.site import NotStartedError
from actors.site_pool import end_of, words_of
from gcml_ray.records import SiteFailure


def classify(error: ray.exceptions.RayError, *, site: str, stage: str, round_number: int) -> SiteFailure:
    """A Ray error as a failure record: the site raised, died, or cannot be reached for now."""
    cause = getattr(error, "cause", None) or error
    kind: Literal["raised", "died", "unreachable"] = "raised"
    if isinstance(error, ray.exceptions.ActorDiedError) or isinstance(cause, NotStartedError):
        kind = "died"
    elif isinstance(error, ray.exceptions.RayActorError):
        kind = "unreachable"
    words = words_of(cause) if cause is not error else _in_a_line(error) or type(error).__name__
    return SiteFailure(site, round_number, stage, kind, words, type(cause).__name__, end_of(str(error)))


def _in_a_line(error: ray.exceptions.RayError) -> str:
    """What a message of Ray says; of an actor that could not be built, the end of the traceback: why."""
    if isinstance(error, ray.exceptions.ActorUnavailableError):  # Ray gives the words of its transport here
        return "its process has ended, or cannot be reached"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"its process could not be set up: {lines[-1]}" if "creation task" in lines[0] else lines[0]
