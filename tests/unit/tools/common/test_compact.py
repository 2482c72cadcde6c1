"""Result files: short, one line a record."""

import json
from pathlib import Path

from think_vllm.tools.common.compact import compact_json, write_json

FIELDS = {
    **{"name": "x", "numbers": [1, 2.0], "empty": {}},
    "records": [{"a": 1 / 3}, {"a": float("nan")}],
    "by_name": {"b": {"c": (1, None)}, 7: {"d": True}},
}


def test_compact_json_has_a_line_for_each_record() -> None:
    text = compact_json(FIELDS)
    assert text.splitlines()[3:7] == [
        '"records": [', '{"a": 0.3333333},', '{"a": null}', "],"
    ]  # fmt: skip
    assert json.loads(text) == {
        **{"name": "x", "numbers": [1, 2.0], "empty": {}},
        "records": [{"a": 0.3333333}, {"a": None}],
        "by_name": {"b": {"c": [1, None]}, "7": {"d": True}},
    }


def test_write_json_makes_the_folder_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    write_json(path, FIELDS)
    write_json(path, {"name": "y"})
    assert json.loads(path.read_text()) == {"name": "y"}
    assert list(path.parent.iterdir()) == [path]
