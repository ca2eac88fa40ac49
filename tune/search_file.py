"""Search files: YAML in, a :class:`~tune.trial_config.Search` out; and the copy in the search's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gcml_ray.config import GcmlMethod, dcml_keys
from gcml_ray.config.file import (
    apply_override,
    find_base,
    load_config,
    read_sections,
    save_config,
    save_sections,
    setting,
)
from gcml_ray.config.problems import describe_problems
from gcml_ray.errors import CheckpointError, ConfigError
from tune.space import ChoiceDomain, Domain, SearchConfig
from tune.trial_config import DCML_KEYS, Search, trial_config

SEARCH_FILE, BASE_FILE = "search.yaml", "base.yaml"


def load_search(path: str | Path, overrides: tuple[str, ...] = (), base_overrides: tuple[str, ...] = ()) -> Search:
    """Reads a search and the federation that it names.

    Args:
        path: the YAML file.
        overrides: ``budget.trials=4``, keys of the search.
        base_overrides: ``federation.rounds=6``, keys of the federation, after the file's own ``base_overrides``.

    Raises:
        ConfigError: names every problem, its key, what was received and what is allowed.
    """
    values = dict(read_sections(path, "tune"))
    problems = []
    for override in overrides:
        problems += _beyond_reach(values, override) or apply_override(values, override)
    config = None
    try:
        config = SearchConfig.model_validate(values)
    except ValidationError as error:
        problems += describe_problems(error, SearchConfig)
    if problems or config is None:
        raise ConfigError("\n".join([f"search {path}: {len(problems)} problem(s)", *(f"  {p}" for p in problems)]))
    base_file = find_base(Path(path).resolve(), config.base)
    changes = (*config.base_overrides, *base_overrides)
    try:
        base = load_config(base_file, (*changes, setting("output.folder", config.folder)))
    except ConfigError as error:
        made_of = "base, base_overrides and --base-set" if changes else "base"
        raise ConfigError(f"search {path}, the federation of its {made_of}: {error}") from error
    absolute = {
        "base": str(base_file),
        "base_overrides": changes,
        "folder": base.output.folder,
    }
    search = Search(config.model_copy(update=absolute), base)
    _check(search)
    return search


def _beyond_reach(values: dict[str, Any], override: str) -> list[str]:
    """Why an override cannot name a searched key: ``--set`` would read the key's own dots as sections."""
    section, _, key = override.partition("=")[0].strip().partition(".")
    space = values.get("space")
    if section != "space" or "." not in key or (isinstance(space, dict) and key.partition(".")[0] in space):
        return []
    return [
        f"--set {override}: a searched key has dots of its own, which --set takes for sections; change space in the "
        "file, or set it whole: --set 'space={method.dcml.lambda: {name: uniform, low: 0, high: 1}}'"
    ]


def save_search(search: Search) -> None:
    """Writes ``search.yaml`` and ``base.yaml`` into the search's folder, which then needs no other file."""
    search.folder.mkdir(parents=True, exist_ok=True)
    save_config(search.base, search.folder / BASE_FILE)
    own = search.config.model_dump(mode="json") | {"base": BASE_FILE, "base_overrides": []}
    save_sections(own, search.folder / SEARCH_FILE)


def reopen_search(folder: Path) -> Search:
    """The search that :func:`save_search` wrote, also where its folder has been moved.

    Raises:
        CheckpointError: the folder holds none.
    """
    path = folder / SEARCH_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} is not the folder of a search: it holds no {SEARCH_FILE}")
    return load_search(path, (setting("folder", folder.resolve()),))


def _check(search: Search) -> None:
    """What only the search and the federation together can show."""
    federation, problems = search.base.federation, []
    if search.config.scheduler.name != "none" and search.grace_rounds <= federation.num_warmup:
        problems.append(
            f"scheduler.grace_rounds: received {search.grace_rounds}, but sites train alone in the first "
            f"{federation.num_warmup} rounds (federation.warmup_rounds), where no searched weight acts; give more"
        )
    if federation.time_limit_s is not None:
        problems.append(
            f"base: federation.time_limit_s is {federation.time_limit_s:g}: trials that it ends have no last round to "
            "be compared by; set it to null (base_overrides: [federation.time_limit_s=null]) and choose budget.trials "
            "and federation.rounds by the time there is"
        )
    if federation.seed in search.config.final.seeds:
        problems.append(
            f"final.seeds: {federation.seed} is the seed of the trials (federation.seed), which the winner was "
            "chosen by; give others"
        )
    for key, domain in search.config.space.items():
        problems += _unknown_key(search, key, domain)
    if problems:
        raise ConfigError("\n".join([f"search {search.config.name}: {len(problems)} problem(s)", *problems]))


def _unknown_key(search: Search, key: str, domain: Domain) -> list[str]:
    """What is wrong with a searched key, tried with one value of its domain; wrong values are the trials' matter."""
    value = domain.labels[0] if isinstance(domain, ChoiceDomain) else domain.low
    if _is_never_used(search, key):
        variant = search.base.method.dcml.variant  # type: ignore[union-attr]
        return [f"space.{key} would be ignored by variant {variant}: search method.dcml.variant too, or leave it out"]
    try:
        trial_config(search, {key: value}, folder=search.folder)
    except ConfigError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        return [f"space: {line}" for line in lines if "unknown key" in line or "has no such key" in line]
    return []


def _is_never_used(search: Search, key: str) -> bool:
    """Whether no trial uses a weight of the mutual step, because the variant is fixed to one without it."""
    method = search.base.method
    is_fixed = not {"method", "method.dcml", "method.dcml.variant"} & set(search.config.space)
    name = key.removeprefix("method.dcml.")
    return (
        is_fixed
        and isinstance(method, GcmlMethod)
        and key != name
        and name in DCML_KEYS - dcml_keys(method.dcml.variant)
    )
