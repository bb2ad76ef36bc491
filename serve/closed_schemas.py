"""Objects of a JSON schema without further properties. Most schemas do not say so (pydantic's never do), and a model
that may invent properties often does until its context is full."""

from __future__ import annotations

from typing import Any

# keywords by the form of their value: a schema, a list of schemas, an object of schemas
SCHEMA = ("items", "additionalProperties", "not", "if", "then", "else", "contains")
SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
# Beside these, `properties` is not all that an object may have.
OPENING = (
    "additionalProperties",
    "unevaluatedProperties",
    "patternProperties",
    "allOf",
    "anyOf",
    "oneOf",
    "$ref",
    "if",
)


def close_objects(schema: Any) -> Any:
    """A copy of the schema in which objects with `properties` have no others, unless the schema says that they do.

    A schema that combines several with `allOf` is returned as it is: closed parts of it would exclude each other.
    """
    return schema if _combines(schema) else _close(schema)


def close_parameters(schema: Any) -> Any:
    """`close_objects` for the parameters of a function: an object without `properties` has none."""
    if not schema or (isinstance(schema, dict) and schema.get("type") == "object" and "properties" not in schema):
        schema = {"type": "object", "properties": {}} | (schema or {})
    return close_objects(schema)


def _close(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    closed = {name: _close_value(name, value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not any(name in schema for name in OPENING):
        closed["additionalProperties"] = False
    return closed


def _close_value(name: str, value: Any) -> Any:
    if name in SCHEMA:
        return _close(value)
    if name in SCHEMAS and isinstance(value, list):
        return [_close(each) for each in value]
    if name in SCHEMAS_BY_NAME and isinstance(value, dict):
        return {key: _close(each) for key, each in value.items()}
    return value


def _combines(schema: Any) -> bool:
    """Whether an `allOf` with several members is anywhere."""
    rest = [schema]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            members = value.get("allOf")
            if isinstance(members, list) and (len(members) > 1 or "properties" in value):
                return True
            rest += value.values()
        elif isinstance(value, list):
            rest += value
    return False
