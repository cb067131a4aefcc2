"""A validator of the JSON Schema keywords that the published schema uses, and of no other.

Written from the 2020-12 specification (core §8.2.3 `$ref`; validation §6 and §9). A keyword that it
does not know is an error, so that nothing in the schema goes unchecked.
"""

from __future__ import annotations

from typing import Any

ANNOTATIONS = {"$schema", "$id", "$defs", "title", "description", "default"}
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
APPLIES: dict[str, type | tuple[type, ...]] = {
    "required": dict,
    "properties": dict,
    "additionalProperties": dict,
    "items": list,
    "minimum": (int, float),
    "maximum": (int, float),
}
"""Keywords that say nothing about values of another type."""


def errors(value: Any, schema: dict[str, Any], root: dict[str, Any], path: str = "$") -> list[str]:
    """Where a value does not fit a schema; empty if it does."""
    found: list[str] = []
    for keyword, rule in schema.items():
        wants = APPLIES.get(keyword)
        if keyword in ANNOTATIONS or (wants is not None and not isinstance(value, wants)):
            continue
        if keyword == "$ref":
            found += errors(value, root["$defs"][rule.removeprefix("#/$defs/")], root, path)
        elif keyword == "type":
            fits = isinstance(value, TYPES[rule]) and (
                rule == "boolean" or not isinstance(value, bool)
            )
            if not fits:
                found.append(f"{path} is {type(value).__name__}, not {rule}")
        elif keyword == "anyOf":
            if all(errors(value, option, root, path) for option in rule):
                found.append(f"{path} fits none of {len(rule)} alternatives")
        elif keyword == "enum":
            if value not in rule:
                found.append(f"{path} is {value!r}, none of {rule}")
        elif keyword == "const":
            if value != rule:
                found.append(f"{path} is {value!r}, not {rule!r}")
        elif keyword == "required":
            found += [f"{path}.{name} is missing" for name in rule if name not in value]
        elif keyword == "properties":
            for name, inner in rule.items():
                if name in value:
                    found += errors(value[name], inner, root, f"{path}.{name}")
        elif keyword == "additionalProperties":
            own = schema.get("properties", {})
            for name, inner in value.items():
                if name not in own:
                    found += errors(inner, rule, root, f"{path}.{name}")
        elif keyword == "items":
            for number, inner in enumerate(value):
                found += errors(inner, rule, root, f"{path}[{number}]")
        elif keyword in ("minimum", "maximum"):
            wrong = value < rule if keyword == "minimum" else value > rule
            found += [f"{path} is {value}, {keyword} {rule}"] if wrong else []
        else:
            raise AssertionError(f"{path}: this validator does not know the keyword {keyword!r}")
    return found
