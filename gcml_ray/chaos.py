"""Faults on purpose: ``kill:CS@r3, slow:HTx5, raise:DU@merge, nan:FG@r2`` as records.

A fault is ``KIND:SITE``, with ``xFACTOR`` or ``->SITE`` where its kind wants one, and then any number of
``@WHEN``: a round (``@r3``), rounds (``@r3-r8``, ``@r3-``) or a stage (``@merge``). Without a round it
happens in every one. This module only reads the words; ``actors/faulty_trainer.py`` makes them come true.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from gcml_ray.errors import ConfigError

STAGES = ("load", "train", "merge", "validate", "checkpoint", "push")
BREAKDOWNS = {
    "kill": "the process ends at once",
    "hang": "the site never answers again",
    "raise": "the site's code fails",
    "oom": "out of memory",
    "disk": "no space left for the checkpoint",
    "nan": "the weights become NaN while training",
    "slow": "every step takes FACTOR times as long",
}
LIES = {
    "random": "pushes random weights",
    "flip": "pushes its weights with their signs turned round",
    "scale": "pushes its weights times FACTOR",
    "nan_push": "pushes weights that hold NaN",
    "stale": "pushes again its first push",
    "replay": "pushes the weights of its first push as if they were new",
    "impersonate": "pushes in the name of another site",
    "labels": "trains on labels that are wrong everywhere",
}
KINDS = BREAKDOWNS | LIES

STAGES_OF = {**dict.fromkeys(("kill", "hang", "raise", "oom"), STAGES), "disk": ("checkpoint",)}  # the others: none
NOT_OF_SERVER, SERVER_STAGES = ("nan", "labels"), ("", "train", "checkpoint", "push")
ONCE = ("kill", "hang", "raise", "oom", "disk", "nan")  # with a single round; a lie goes on as long as it is told
_SITE = r"(?P<site>[A-Za-z0-9_.\-]+?)"
_PLAIN = (re.compile(_SITE), "SITE")
_FORMS = {  # how a kind names its site, where that is not all it wants to know
    "slow": (re.compile(_SITE + r"x(?P<factor>[0-9]+(?:\.[0-9]+)?)"), "SITEx5"),
    "scale": (re.compile(_SITE + r"x(?P<factor>[0-9]+(?:\.[0-9]+)?)"), "SITEx100"),
    "impersonate": (re.compile(_SITE + r"->(?P<victim>[A-Za-z0-9_.\-]+)"), "SITE->SITE"),
}
_ROUNDS = re.compile(r"r(?P<first>[0-9]+)(?P<dash>-)?(?:r(?P<last>[0-9]+))?")


@dataclass(frozen=True)
class Fault:
    """What goes wrong at one site, and when.

    ``stage`` is empty where the kind has none. ``last_round`` None: to the end of the run. ``factor`` is 1 and
    ``victim`` empty where the kind has none. ``text`` is the fault as it was written.
    """

    kind: str
    site: str
    text: str
    factor: float = 1.0
    victim: str = ""
    stage: str = ""
    first_round: int = 1
    last_round: int | None = None

    def covers(self, round_number: int) -> bool:
        """Whether it belongs to a round."""
        return self.first_round <= round_number and (self.last_round is None or round_number <= self.last_round)

    @property
    def happens_once(self) -> bool:
        """Whether it must not happen again when its round is repeated: after a restart, or a resume."""
        return self.kind in ONCE and self.first_round == self.last_round

    @property
    def marker(self) -> str:
        """Name of the file that says that it has happened."""
        return f"chaos_{self.kind}_{self.stage or 'any'}_r{self.first_round}.done"


def parse_chaos(text: str) -> tuple[Fault, ...]:
    """The faults of a text, in its order; none where it is empty.

    Raises:
        ConfigError: parts of it cannot be read; all of them are named, with what is allowed.
    """
    faults: list[Fault] = []
    problems: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if part:
            try:
                faults.append(_fault(part))
            except ValueError as error:
                problems.append(f"{part!r}: {error}")
    twice = Counter((fault.site, fault.marker) for fault in faults if fault.happens_once)
    problems += [
        f"{site}: the same fault stands there {count} times" for (site, _), count in twice.items() if count > 1
    ]
    if problems:
        raise ConfigError("; ".join(problems))
    return tuple(faults)


def faults_of(text: str, site: str) -> tuple[Fault, ...]:
    """The faults of one site."""
    return tuple(fault for fault in parse_chaos(text) if fault.site == site)


def check_sites(text: str, sites: Collection[str], *, server: str = "") -> None:
    """Refuses faults of sites that the federation does not have, and those that its server cannot have.

    Args:
        text: the faults.
        sites: names of sites.
        server: the server's name; empty where the method has none.

    Raises:
        ConfigError: names them.
    """
    faults = parse_chaos(text)
    named = {name for fault in faults for name in (fault.site, fault.victim) if name}
    known = {*sites, server} - {""}
    if unknown := sorted(named - known):
        raise ConfigError(f"chaos names {unknown}, not among the sites of this federation: {sorted(known)}")
    for fault in faults:
        if fault.site == server and (fault.kind in NOT_OF_SERVER or fault.stage not in SERVER_STAGES):
            raise ConfigError(
                f"chaos {fault.text!r} cannot happen: a server has no cases and takes no steps, it forms a mean; of "
                f"its faults kill, hang, raise and oom happen at {', '.join(filter(None, SERVER_STAGES))}"
            )


def _fault(part: str) -> Fault:
    """One fault; a ValueError says what is wrong with it."""
    kind, colon, rest = part.partition(":")
    if not colon or kind not in KINDS:
        raise ValueError(f"must be KIND:SITE with one of the kinds {', '.join(KINDS)}")
    target, *whens = rest.split("@")
    form, usage = _FORMS.get(kind, _PLAIN)
    match = form.fullmatch(target)
    if not match:
        raise ValueError(f"{target!r} cannot be read; write {kind}:{usage}")
    found = match.groupdict()
    factor = float(found.get("factor", 1.0))
    if factor <= 0 or (kind == "slow" and factor < 1):
        raise ValueError(f"the factor {factor:g} must be {'at least 1' if kind == 'slow' else 'above 0'}")
    stage, first, last = _when(kind, whens)
    return Fault(kind, found["site"], part, factor, found.get("victim", ""), stage, first, last)


def _when(kind: str, whens: list[str]) -> tuple[str, int, int | None]:
    """Stage, first and last round of what stands behind the ``@``."""
    allowed = STAGES_OF.get(kind, ())
    stages = [when for when in whens if not _ROUNDS.fullmatch(when)]
    spans = [match for when in whens if (match := _ROUNDS.fullmatch(when))]
    if len(stages) > 1 or len(spans) > 1:
        raise ValueError("takes at most one stage and one round, or range of rounds")
    if stages and stages[0] not in allowed:
        names = f" or a stage: {', '.join(allowed)}" if allowed else f"; {kind} takes no stage"
        raise ValueError(f"@{stages[0]} is not known; write @r3, @r3-, @r3-r8{names}")
    stage = stages[0] if stages else "train" if "train" in allowed else next(iter(allowed), "")
    if not spans:
        return stage, 1, None
    if stage == "load":
        raise ValueError("a site loads before the first round: @load goes without a round")
    first, last = _span(spans[0])
    return stage, first, last


def _span(match: re.Match[str]) -> tuple[int, int | None]:
    """First and last round of ``r3``, ``r3-`` or ``r3-r8``."""
    first = int(match["first"])
    last = int(match["last"]) if match["last"] else None if match["dash"] else first
    if (match["last"] and not match["dash"]) or first < 1 or (last is not None and last < first):
        raise ValueError(f"@{match[0]} is no round: they count from 1, write @r3, @r3- or @r3-r8")
    return first, last
