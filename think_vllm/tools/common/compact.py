"""Results as JSON that is short, and whose changes a person can read."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SIGNIFICANT_DIGITS = 7


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write the file, whole or not at all; its folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(compact_json(fields), encoding="utf-8")
    partial.replace(path)


def compact_json(fields: Mapping[str, Any]) -> str:
    """One line for each field, and for each record of a field that is a list or mapping of records.

    Args:
        fields: Of a JSON document. Numbers keep 7 significant digits; what is no number is null.
    """
    lines = [f"{json.dumps(name)}: {_field(_rounded(value))}" for name, value in fields.items()]
    return "{" + ",\n".join(lines) + "}\n"


def _field(value: Any) -> str:
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
    if isinstance(value, dict) and any(isinstance(item, dict) for item in value.values()):
        items = (f"{json.dumps(name)}: {json.dumps(item)}" for name, item in value.items())
        return "{\n" + ",\n".join(items) + "\n}"
    return json.dumps(value)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
