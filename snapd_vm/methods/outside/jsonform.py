"""Holds JSON from strangers against a JSON Schema of ours: the keywords that ours uses, no others.

A library would be imported by every daemon for the few that have an executable. A schema with a
keyword that is not known here is refused, so that nothing in it goes unheeded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from snapd_vm.model import Json

_NO_MEANING = {"$schema", "$id", "$defs", "title", "description"}
_KEYWORDS = {
    *("$ref", "type", "enum", "required", "properties", "additionalProperties", "propertyNames"),
    *("minProperties", "maxProperties", "items", "maxItems", "minLength", "maxLength", "pattern"),
    *("minimum", "maximum"),
}
_TYPES: Mapping[str, type] = {"object": dict, "array": list, "string": str, "boolean": bool}
_DEEPEST = 16


class Unfit(Exception):
    """The JSON is not of the form; the message says where and why, in bounded words."""


class Form:
    """A schema document; `check` holds a value against one of its definitions."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document

    def check(self, value: Json, pointer: str) -> None:
        """Raise Unfit unless the value is as the schema at `pointer` ("#/$defs/…") says."""
        self._check(value, {"$ref": pointer}, "", 0)

    def _check(self, value: Json, schema: Mapping[str, Any], where: str, depth: int) -> None:
        unknown = schema.keys() - _KEYWORDS - _NO_MEANING
        if unknown:
            raise AssertionError(f"the schema has keywords that are not known: {unknown}")
        if depth > _DEEPEST:
            raise Unfit("it is nested too deeply")
        if "$ref" in schema:
            self._check(value, self._resolve(schema["$ref"]), where, depth + 1)
        at = f"{where or 'it'} "
        for problem in _problems(value, schema):
            raise Unfit(at + problem)
        if isinstance(value, dict):
            self._check_members(value, schema, where, depth)
        elif isinstance(value, list) and "items" in schema:
            for number, item in enumerate(value):
                self._check(item, schema["items"], f"{where}[{number}]", depth + 1)

    def _check_members(
        self, value: Mapping[str, Json], schema: Mapping[str, Any], where: str, depth: int
    ) -> None:
        known = schema.get("properties", {})
        others = schema.get("additionalProperties", True)
        names = schema.get("propertyNames")
        for key, member in value.items():
            inside = f"{where}.{key[:40]!r}" if where else repr(key[:40])
            if names is not None:
                self._check(key, names, f"the key {inside}", depth + 1)
            if key in known:
                self._check(member, known[key], inside, depth + 1)
            elif others is False:
                raise Unfit(f"{inside} is not known")
            elif others is not True:
                self._check(member, others, inside, depth + 1)

    def _resolve(self, pointer: str) -> Mapping[str, Any]:
        found: Any = self._document
        for part in pointer.removeprefix("#/").split("/"):
            found = found[part]
        resolved: Mapping[str, Any] = found
        return resolved


def _problems(value: Json, schema: Mapping[str, Any]) -> Iterator[str]:
    wanted = schema.get("type")
    if wanted is not None and not _is(value, wanted):
        yield f"is not of type {wanted}"
    # 1 and true are equal in Python, and not in JSON.
    if "enum" in schema and not any(
        type(one) is type(value) and one == value for one in _of(schema)
    ):
        yield f"is none of {', '.join(map(str, _of(schema)))}"
    if isinstance(value, dict):
        missing = next((key for key in schema.get("required", ()) if key not in value), "")
        if missing:
            yield f"lacks {missing!r}"
        yield from _bounds(len(value), schema, "Properties", "members")
    elif isinstance(value, list):
        yield from _bounds(len(value), schema, "Items", "members")
    elif isinstance(value, str):
        yield from _bounds(len(value), schema, "Length", "characters")
        if "pattern" in schema and not re.search(schema["pattern"], value):
            yield "is not of the form that is asked for"
    elif isinstance(value, int) and not _between(value, schema):
        yield "is too small or too large"


def _between(value: int, schema: Mapping[str, Any]) -> bool:
    return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))


def _of(schema: Mapping[str, Any]) -> Iterable[Json]:
    found: Iterable[Json] = schema["enum"]
    return found


def _is(value: Json, wanted: str) -> bool:
    if wanted == "integer":
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, _TYPES[wanted])


def _bounds(count: int, schema: Mapping[str, Any], what: str, words: str) -> Iterator[str]:
    if count < schema.get(f"min{what}", 0):
        yield f"has fewer than {schema[f'min{what}']} {words}"
    if count > schema.get(f"max{what}", count):
        yield f"has more than {schema[f'max{what}']} {words}"


def read(text: str) -> Json:
    """One JSON value of a stranger's text, whose length its reader has bounded. Raises Unfit."""
    try:
        found: Json = json.loads(text, parse_constant=_refuse, object_pairs_hook=_unique)
    except RecursionError:
        raise Unfit("it is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError too, and an integer of too many digits
        raise Unfit(f"it is not JSON: {str(error)[:80]}") from None
    return found


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found
