"""Pydantic's errors about a configuration, told in its own terms: key, value received, what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from gcml_ray.config import Config

Schema = dict[str, Any]


@dataclass(frozen=True)
class _Place:
    """A place in the configuration: its dotted path, its JSON schema, and the variant it is, if it is one.

    ``variant`` is the name that picked one of several sections, e.g. ``gcml`` for ``method``, and
    ``simplest_variant`` the one that asks for the fewest keys.
    """

    path: str
    schema: Schema
    variant: str = ""
    simplest_variant: str = ""


def describe_problems(error: ValidationError, model: type[BaseModel] = Config) -> list[str]:
    """One line for every problem, in the order of the keys of ``model``."""
    root = _schema_of(model)
    return [_describe(detail, root) for detail in error.errors(include_url=False) if not _is_aftermath(detail)]


@cache
def _schema_of(model: type[BaseModel]) -> Schema:
    """The JSON schema of a model, not to be changed; making it takes a tenth of a second."""
    return model.model_json_schema()


def _is_aftermath(detail: ErrorDetails) -> bool:
    """A sequence that is "too short" only because some of its items were wrong."""
    received = detail["input"]
    return (
        detail["type"] == "too_short"
        and isinstance(received, Sequence)
        and len(received) >= detail["ctx"]["min_length"]
    )


def _describe(detail: ErrorDetails, root: Schema) -> str:
    place, received = _find(detail["loc"], root), detail["input"]
    match detail["type"]:
        case "extra_forbidden":
            return _describe_unknown_key(str(detail["loc"][-1]), _find(detail["loc"][:-1], root))
        case "missing":
            return f"{place.path}: missing; required: {_allowed(place.schema)}"
        case "union_tag_not_found":
            return f"{place.path}.name: missing; allowed: {_variants(place.schema)}"
        case "union_tag_invalid":
            return f"{place.path}.name: received {detail['ctx']['tag']!r}; allowed: {_variants(place.schema)}"
        case "value_error":
            return f"{place.path or 'across sections'}: {detail['ctx']['error']}"
    return f"{place.path}: received {received!r}; must be {_requirement(detail)}"


def _requirement(detail: ErrorDetails) -> str:
    """What a value must be, after the words "must be"."""
    received = detail["input"]
    match detail["type"]:
        case "model_type" | "model_attributes_type" | "dict_type":
            return "a section of 'key: value' lines"
        case "tuple_type":
            return "a list, [a, b]"
        case "string_too_short":
            return "text that is not empty"
        case "too_short":
            return f"{detail['ctx']['min_length']} or more of them, not {detail['ctx']['actual_length']}"
        case "string_type" if not isinstance(received, dict | list):
            no_text = f"text, not {type(received).__name__}: put it in quotes"
            return no_text if received is not None else "text (a name such as null: put it in quotes)"
    return detail["msg"].removeprefix("Input should be ")


def _describe_unknown_key(key: str, section: _Place) -> str:
    keys = list(section.schema.get("properties", {}))
    path = f"{section.path}.{key}".removeprefix(".")
    close = difflib.get_close_matches(key, keys, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    if not section.variant:
        return f"{path}: unknown key; {hint}allowed: {', '.join(keys)}"
    return (
        f"{path}: {section.path} {section.variant!r} has no such key; {hint}allowed: {', '.join(keys)}. To change "
        f"{section.path}, replace it whole, e.g. --set '{section.path}={{name: {section.simplest_variant}}}'"
    )


# --- the schema ------------------------------------------------------------------------------


def _find(location: tuple[int | str, ...], root: Schema) -> _Place:
    """The place that pydantic's location means. Its steps are keys, list indices and names of variants."""
    place = _Place("", root)
    for step in location:
        schema = _resolve(place.schema, root)
        variants = schema.get("discriminator", {}).get("mapping", {})
        if step in variants:
            options = {name: _resolve({"$ref": reference}, root) for name, reference in variants.items()}
            simplest = min(options, key=lambda name: (len(options[name]["required"]), name != "local"))
            place = _Place(place.path, options[str(step)], variant=str(step), simplest_variant=simplest)
            continue
        inner = schema.get("properties", {}).get(step) or schema.get("additionalProperties") or schema.get("items")
        path = f"{place.path}[{step}]" if isinstance(step, int) else f"{place.path}.{step}".removeprefix(".")
        place = _Place(path, inner if isinstance(inner, dict) else {})
    return replace(place, schema=_resolve(place.schema, root))


def _resolve(schema: Schema, root: Schema) -> Schema:
    """The schema behind a reference or an optional value."""
    for option in schema.get("anyOf", []):
        if option.get("type") != "null":
            return _resolve(option, root)
    if "$ref" in schema:
        resolved: Schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
        return resolved
    return schema


def _allowed(schema: Schema) -> str:
    """What a key that is missing should hold, in a few words."""
    if "enum" in schema or "const" in schema:
        return " or ".join(repr(value) for value in schema.get("enum") or [schema["const"]])
    if "properties" in schema:
        return f"a section with {', '.join(schema.get('required') or schema['properties'])}"
    if "discriminator" in schema:
        return f"a section whose name is {_variants(schema)}"
    words = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false"}
    words |= {"array": "a list", "object": "a section of 'key: value' lines"}
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = [f"{word} {schema[bound]}" for bound, word in bounds.items() if bound in schema]
    return " ".join([words[schema["type"]], " and ".join(limits)]).strip()


def _variants(schema: Schema) -> str:
    return " or ".join(repr(name) for name in schema["discriminator"]["mapping"])
