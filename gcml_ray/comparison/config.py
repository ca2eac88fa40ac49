"""The file behind ``gcml compare``: one base configuration, many methods, several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from gcml_ray.config import POOLED, Config
from gcml_ray.config.file import find_base, load_config, read_sections, setting
from gcml_ray.config.problems import describe_problems
from gcml_ray.config.section import Name, Section
from gcml_ray.errors import ConfigError

OWN_OF_A_CELL = {"federation.seed": "seeds", "output.folder": "output", "tracking.experiment": "name"}


class ComparisonConfig(Section):
    """What is compared.

    ``base`` is a configuration file, beside this one or absolute. ``common`` is what every method changes in it,
    ``methods`` each method's name in the table and what it changes on top, by dotted path. ``output`` gets the run
    folders, ``results`` one small CSV file a finished cell. ``alone`` and ``focus`` name the two methods of the verdict
    a site.
    """

    name: Name
    base: Name
    seeds: Annotated[tuple[int, ...], Field(strict=False, min_length=1)]
    common: dict[str, Any] = Field(default={})
    methods: dict[str, dict[str, Any]]
    output: Name
    results: Name
    alone: str = "local"
    focus: str = "gcml"

    @property
    def bounds(self) -> tuple[str, ...]:
        """Methods that pool the cases of all sites: a bound from above, not something that a federation may choose."""
        return tuple(
            name
            for name, changes in self.methods.items()
            if POOLED in (changes.get("method.name"), (changes.get("method") or {}).get("name"))
        )

    @model_validator(mode="after")
    def _names_exist(self) -> ComparisonConfig:
        for key in ("alone", "focus"):
            if getattr(self, key) not in self.methods:
                raise ValueError(f"{key}: {getattr(self, key)!r} is not among methods {list(self.methods)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)} names one twice; a seed is run once")
        for name in self.methods:
            if set(name) & set("/\\|\n"):
                raise ValueError(
                    f"methods: {name!r} names folders, files and a table's line: leave out / \\ | and line breaks"
                )
        return self


def load_comparison(path: Path, overrides: Sequence[str] = ()) -> ComparisonConfig:
    """Reads and checks a comparison file and the configuration of each of its methods.

    Args:
        path: the YAML file.
        overrides: ``--set`` of the command line, for every cell.

    Raises:
        ConfigError: it names every wrong key, and in which method.
    """
    try:
        comparison = ComparisonConfig.model_validate(read_sections(path, "compare"))
    except ValidationError as error:
        raise _wrong(path, describe_problems(error, ComparisonConfig)) from error
    comparison = comparison.model_copy(update={"base": str(find_base(path, comparison.base))})
    problems = _misplaced(overrides) or _problems_of_methods(comparison, overrides)
    if problems:
        raise _wrong(path, problems)
    return comparison


def _wrong(path: Path, problems: Sequence[str]) -> ConfigError:
    return ConfigError("\n".join([f"comparison {path}: {len(problems)} problem(s)", *(f"  {p}" for p in problems)]))


def _misplaced(overrides: Sequence[str]) -> list[str]:
    """Overrides that mean the comparison rather than its cells."""
    own, of_cells = set(ComparisonConfig.model_fields), set(Config.model_fields)
    given = {override: override.partition("=")[0].strip() for override in overrides}
    keys = {override: OWN_OF_A_CELL.get(key, key) for override, key in given.items()}
    return [
        f"--set {override}: {key.partition('.')[0]} is a key of the comparison file, change it there; --set changes "
        "the configuration of every cell"
        for override, key in keys.items()
        if key in own or key.partition(".")[0] in own - of_cells
    ]


def _problems_of_methods(comparison: ComparisonConfig, overrides: Sequence[str]) -> list[str]:
    """What is wrong with which method's configuration; what all have in common is said once."""
    found: dict[str, list[str]] = {}
    for method in comparison.methods:
        try:
            cell_config(comparison, method, comparison.seeds[0], overrides)
        except ConfigError as error:
            for line in str(error).splitlines()[1:]:
                found.setdefault(line.strip(), []).append(method)
    everywhere = f"every method (by {comparison.base}, common or --set)"
    return [
        f"{everywhere if len(methods) == len(comparison.methods) else ', '.join(methods)}: {problem}"
        for problem, methods in found.items()
    ]


def cell_config(comparison: ComparisonConfig, method: str, seed: int, overrides: Sequence[str]) -> Config:
    """The configuration of one cell: base, then the common and the method's changes, seed and folder, ``overrides``.

    Its rounds wait for late sites: on a busy machine its results are the same. What the file or ``overrides`` say of
    ``federation.late_factor`` goes first.

    Args:
        comparison: what is compared.
        method: a name among ``comparison.methods``.
        seed: the federation's seed.
        overrides: ``--set`` of the command line, for every cell.
    """
    parts = (comparison.common, comparison.methods[method])
    patience = {"federation.late_factor": None}
    changes = [setting(key, value) for part in (patience, *parts) for key, value in part.items()]
    own = [
        setting("name", method),
        setting("federation.seed", seed),
        setting("output.folder", Path(comparison.output) / cell_name(method, seed)),
        setting("tracking.experiment", comparison.name),
    ]
    return load_config(comparison.base, [*changes, *own, *overrides])


def cell_name(method: str, seed: int) -> str:
    """Name of a cell's run folder and file."""
    return f"{method}_seed{seed}"
