"""Configuration files: YAML in, :class:`~gcml_ray.config.Config` out, and every problem named at once.

Beyond plain YAML 1.1: ``1e-3`` is a number (YAML 1.1 wants ``1.0e-3``), and a key that stands twice in
one mapping is an error instead of silently winning. ``${VAR}`` and a leading ``~`` are expanded in
``data.datalist``, ``data.cache_folder``, ``output.folder``, ``tracking.uri`` and ``network.start_from``; a relative
path there is relative to the current directory and becomes absolute on load.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from gcml_ray.config import Config
from gcml_ray.config.problems import describe_problems
from gcml_ray.errors import ConfigError
from gcml_ray.files.whole_files import replace_file
from gcml_ray.wording import in_shell

_EXPONENT_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_SQLITE = "sqlite:///"
_TAG = "tag:yaml.org,2002:"
_UNWANTED = [_TAG + kind for kind in ("binary", "omap", "pairs", "set", "timestamp")]  # what JSON does not have
_MAX_NODES = 100_000  # values of a file, aliases written out

Kind = Literal["run", "compare", "tune"]  # by the command that takes the file
_KINDS: dict[Kind, tuple[str, set[str]]] = {  # what it is called, and two keys that tell it from the others
    "run": ("the configuration of a federation", {"data", "method"}),
    "compare": ("a comparison file", {"base", "methods"}),
    "tune": ("a search file", {"base", "space"}),
}


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys, aliases that multiply, and what its own constructors choke on."""

    def get_single_node(self) -> yaml.Node | None:
        """The document; refuses one that gets too large with its aliases written out, or that contains itself."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _written_out(node, {}) > _MAX_NODES:
            raise ConfigError(f"its aliases (*name) stand for more than {_MAX_NODES} values; write out what is meant")
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A value of a type that JSON has too; ``!!int abc`` is an error that names its line."""
        kind = node.tag.rpartition(":")[2]
        if node.tag in _UNWANTED:
            what = f"!!{kind} has no place in a configuration; write text, numbers, lists and mappings"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
        try:
            value = super().construct_object(node, deep=deep)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            what = f"{str(node.value)[:60]!r} cannot be read as {kind}"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark) from error
        if isinstance(value, float) and not math.isfinite(value):
            raise yaml.constructor.ConstructorError(None, None, f"{node.value} is no finite number", node.start_mark)
        return value

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here rather than in construct_mapping: by then a merge (<<) has put inherited keys beside the own ones.
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                raise ConfigError(f"line {line}: key {key.value!r} stands already on line {lines[key.value]}; keep one")
            if isinstance(key, yaml.ScalarNode):
                lines[key.value] = line
            if key.tag not in (f"{_TAG}str", f"{_TAG}merge", f"{_TAG}value"):
                shown = repr(key.value) if isinstance(key, yaml.ScalarNode) else "[...]"
                raise ConfigError(f"line {line}: a key must be text, {shown} is not; put it in quotes")
        return node


def _written_out(node: yaml.Node, known: dict[int, int]) -> int:
    """How many nodes a document has without aliases; infinitely many (a large number) where one holds itself."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = _MAX_NODES + 1  # as long as it is not counted, to meet it again is a cycle
    inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
    children = [] if isinstance(node, yaml.ScalarNode) else inner
    known[id(node)] = 1 + sum(_written_out(child, known) for child in children)
    return known[id(node)]


class _Dumper(yaml.SafeDumper):
    """Writes what :class:`_Loader` reads back: a string such as "1e-3" gets its quotes."""


_Loader.yaml_implicit_resolvers = {  # 2024-05-01 stays the text that it is
    first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_TAG}timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT_FLOAT, list("-+.0123456789"))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads, overrides, expands and checks one configuration file.

    Args:
        path: the YAML file.
        overrides: ``a.b.c=value``, applied in order; the value is YAML, so ``method={name: local}``
            replaces a whole section and ``tracking.uri=null`` empties a key.

    Raises:
        ConfigError: the file cannot be read or is not a YAML mapping, an override cannot be applied, or
            values are wrong; the message lists every problem on a line of its own.
    """
    raw = read_sections(path, "run")
    return parse_config(raw, overrides, source=f"configuration {path}")


def read_sections(path: str | Path, kind: Kind) -> dict[str, Any]:
    """The top level of a YAML file, unchecked.

    Raises:
        ConfigError: the file cannot be read, is not a YAML mapping, or is one of another kind.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a UTF-8 text file"
        raise ConfigError(f"cannot read configuration {path}: {reason}") from error
    try:
        raw = _parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"configuration {path}: {error}") from error
    if not isinstance(raw, dict):
        received = "an empty file" if raw is None else f"a {type(raw).__name__}"
        raise ConfigError(f"configuration {path}: the top level must be sections ('key: value' lines), not {received}")
    for other, (name, keys) in _KINDS.items():
        if other != kind and keys <= raw.keys() and not _KINDS[kind][1] <= raw.keys():
            raise ConfigError(f"{path} is {name}: gcml {other} {in_shell(path)}")
    return raw


def find_base(path: Path, base: str) -> Path:
    """The configuration that a comparison or a search varies; ``base`` is relative to the folder of its file.

    Raises:
        ConfigError: it is no configuration that can be read.
    """
    found = path.parent / Path(base).expanduser()
    try:
        read_sections(found, "run")
    except ConfigError as error:
        raise ConfigError(f"{path}, base: {error}. A relative base starts at the folder of {path.name}") from error
    return found


def parse_config(raw: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str) -> Config:
    """Checks plain nested values, as from YAML, after applying ``overrides``; see :func:`load_config`.

    Args:
        raw: sections; not changed.
        overrides: ``a.b.c=value``.
        source: what the values are, for the message.
    """
    values = _copy_mappings(dict(raw))
    problems = [problem for override in overrides for problem in apply_override(values, override)]
    problems += _expand_paths(values)
    config = None
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        problems += describe_problems(error)
    if problems or config is None:
        raise ConfigError("\n".join([f"{source}: {len(problems)} problem(s)", *(f"  {line}" for line in problems)]))
    return config


def save_config(config: Config, path: str | Path) -> None:
    """Writes a configuration with all its defaults; :func:`load_config` gives an equal one back."""
    save_sections(config.model_dump(mode="json", by_alias=True), path)


def save_sections(values: Mapping[str, Any], path: str | Path) -> None:
    """Writes plain nested values; :func:`read_sections` gives equal ones back."""
    replace_file(Path(path), yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False))


# --- YAML and overrides ----------------------------------------------------------------------


def _parse_yaml(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise ConfigError(f"{line}not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError("not a configuration: its brackets are nested hundreds deep") from error


def _copy_mappings(value: Any) -> Any:
    """A copy that shares no dict with the original: YAML anchors would let one override change two places."""
    return {key: _copy_mappings(item) for key, item in value.items()} if isinstance(value, dict) else value


def setting(key: str, value: Any) -> str:
    """The override that sets a key to just this value: plain, a path or a number of NumPy.

    Raises:
        ConfigError: no file could hold the value.
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    elif hasattr(value, "tolist"):
        value = value.tolist()
    try:
        text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=math.inf)
    except yaml.representer.RepresenterError:
        raise ConfigError(f"{key}: received {value!r}; must be text, a number, a list or a mapping of them") from None
    return f"{key}={text.removesuffix(chr(10)).removesuffix('...').strip()}"


def apply_override(values: dict[str, Any], override: str) -> list[str]:
    """Sets one key in place and returns what is wrong with the override. Whether the key exists is checked later."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        return [f"override {override!r}: expected section.key=value"]
    try:
        value = _parse_yaml(text)
    except ConfigError as error:
        return [f"override {override!r}: {error}"]
    section = values
    for depth, key in enumerate(keys[:-1], start=1):
        if section.get(key) is None:
            section[key] = {}
        if not isinstance(section[key], dict):
            return [
                f"override {override!r}: {'.'.join(keys[:depth])} is {section[key]!r}, which has no keys; set it whole"
            ]
        section = section[key]
    section[keys[-1]] = _copy_mappings(value)
    return []


# --- paths -----------------------------------------------------------------------------------


def _expand_paths(values: dict[str, Any]) -> list[str]:
    """Expands the path keys in place and returns one line for each undefined variable."""
    problems = []
    places = [
        ("data", "datalist"),
        ("data", "cache_folder"),
        ("output", "folder"),
        ("tracking", "uri"),
        ("network", "start_from"),
    ]
    sections = [(name, values.get(name), key) for name, key in places]
    others = values.get("site_networks")
    if isinstance(others, dict):
        sections += [(f"site_networks.{site}", section, "start_from") for site, section in others.items()]
    for section_name, section, key in sections:
        text = section.get(key) if isinstance(section, dict) else None
        if not isinstance(section, dict) or not isinstance(text, str) or not text:
            continue
        undefined = [name for name in _VARIABLE.findall(text) if name not in os.environ]
        problems += [
            f"{section_name}.{key}: received {text!r}, but the environment variable {name} is not set; "
            "set it or write the path"
            for name in undefined
        ]
        if not undefined:
            expanded = _VARIABLE.sub(lambda match: os.environ[match[1]], text)
            section[key] = _absolute_uri(expanded) if key == "uri" else _absolute(expanded)
    return problems


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _absolute_uri(uri: str) -> str:
    """A tracking URI with its local path made absolute; servers and registered names stay as they are."""
    if uri.startswith(_SQLITE):
        return _SQLITE + _absolute(uri.removeprefix(_SQLITE))
    is_name = ":" in uri or uri.startswith("databricks")
    return uri if is_name else _absolute(uri)
