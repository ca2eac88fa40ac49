"""A search with its federation, and the configuration of each trial."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gcml_ray.config import Config, dcml_keys
from gcml_ray.config.file import apply_override, parse_config, setting
from gcml_ray.errors import ConfigError
from gcml_ray.search.records import describe_params
from tune.space import ChoiceDomain, Domain, SearchConfig

DCML_KEYS = dcml_keys("contrast")


@dataclass(frozen=True)
class Search:
    """A search and the federation it varies; ``base.output.folder`` is the search's own folder."""

    config: SearchConfig
    base: Config

    @property
    def folder(self) -> Path:
        """The search's folder."""
        return Path(self.base.output.folder)

    @property
    def grace_rounds(self) -> int:
        """Rounds before a scheduler may cut a trial."""
        federation = self.base.federation
        wanted = getattr(self.config.scheduler, "grace_rounds", None)
        return wanted or min(federation.rounds, federation.num_warmup + max(1, federation.rounds // 4))


def trial_config(search: Search, params: dict[str, Any], *, folder: Path, cache: str | None = None) -> Config:
    """The federation with the values that a trial drew.

    All trials share the federation's seed, so that they differ by their values alone.

    Args:
        search: the search.
        params: value, or label of a choice, by key.
        folder: the trial's run folder.
        cache: ``data.cache_folder``; None leaves the federation's.

    Raises:
        ConfigError: the values contradict each other or the federation.
    """
    base = search.base
    values = _dump(base)
    values["name"] = search.config.name
    values["tracking"] = {"enabled": False}
    values["output"] = {**values["output"], "folder": str(folder), "num_overlays": 0}
    if cache is not None:
        values["data"]["cache_folder"] = cache
    if base.resources.placement == "pg":  # the trial has a placement group of its own
        values["resources"]["placement"] = "none"
    drawn = {key: _value(search.config.space[key], param) for key, param in params.items()}
    overrides = [setting(key, value) for key, value in sorted(drawn.items())]
    problems = [problem for override in overrides for problem in apply_override(values, override)]
    if problems:
        raise ConfigError("\n".join(["trial", *problems]))
    _drop_ignored(values)
    return parse_config(values, source=f"trial with {describe_params(params) or 'the base values'}")


def best_config(search: Search, params: dict[str, Any]) -> Config:
    """The federation that :func:`trial_config` tried, as ``gcml run`` takes it: tracked, into a folder of its own."""
    tried = trial_config(search, params, folder=search.folder / "best")
    output = search.base.output.model_copy(update={"folder": str(search.folder / "best")})
    return tried.model_copy(
        update={
            "name": f"{search.config.name}-best",
            "tracking": search.base.tracking,
            "output": output,
            "resources": search.base.resources,
        }
    )


def base_params(search: Search) -> dict[str, Any]:
    """The federation's own values as a trial's: the first trial runs them, so that a winner can be held against them.

    Raises:
        ConfigError: one of them is not in its domain, which the searcher therefore cannot learn from.
    """
    own = _dump(search.base)
    federation = own["federation"]
    federation |= {"warmup_rounds": search.base.federation.num_warmup}  # what null stands for
    federation |= {"cooldown_rounds": search.base.federation.num_cooldown}
    found = {key: _own_param(search, own, key) for key in search.config.space}
    missing = [key for key, param in found.items() if param is _NONE]
    if missing:
        lines = [
            f"space.{key}: the federation's own value, {json.dumps(_at(own, key), default=lambda _: None)}, is not in "
            "it, but the first trial runs the federation as it is; add the value, or change it by base_overrides"
            for key in missing
        ]
        raise ConfigError("\n".join([f"search {search.config.name}: {len(lines)} problem(s)", *lines]))
    return found


_NONE = object()  # None is a value too


def _own_param(search: Search, own: dict[str, Any], key: str) -> Any:
    """The federation's value of a key as a trial's parameter; any value where its variant uses none."""
    domain, value = search.config.space[key], _at(own, key)
    if value is _NONE and key.removeprefix("method.dcml.") in DCML_KEYS:
        return domain.labels[0] if isinstance(domain, ChoiceDomain) else domain.low
    if isinstance(domain, ChoiceDomain):
        return next((label for label in domain.labels if _means(search, key, label, value)), _NONE)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and domain.low <= value <= domain.high else _NONE


def _means(search: Search, key: str, label: Any, value: Any) -> bool:
    """Whether a choice, with its defaults filled in, is a value."""
    if _value(search.config.space[key], label) == value:
        return True
    try:
        return bool(_at(_dump(trial_config(search, {key: label}, folder=search.folder)), key) == value)
    except ConfigError:
        return False


def _dump(config: Config) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(config.model_dump_json(by_alias=True))
    return plain


def _at(values: Any, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return _NONE
        values = values[part]
    return values


def _value(domain: Domain, param: Any) -> Any:
    """A choice's label back as its value; anything else as it is."""
    if isinstance(domain, ChoiceDomain):
        return domain.values[domain.labels.index(param)]
    return param


def _drop_ignored(values: dict[str, Any]) -> None:
    """Leaves out drawn weights that the drawn variant does not use: they are no error in a search."""
    method = values.get("method")
    dcml = method.get("dcml") if isinstance(method, dict) else None
    if isinstance(method, dict) and isinstance(dcml, dict):
        used = dcml_keys(str(dcml.get("variant", "contrast")))
        method["dcml"] = {key: value for key, value in dcml.items() if key in used or key not in DCML_KEYS}
