"""The contract covers all imports from vLLM; its checks say what changed and who relies on it."""

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.support.contract import (
    check_accepts,
    check_defaults,
    check_members,
    check_parameters,
    check_source,
    members,
)


def imported_names() -> list[tuple[str, str]]:
    """Each of our files with each name that it imports from vLLM."""
    found = []
    for path in sorted((REPOSITORY / "think_vllm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                ours = str(path.relative_to(REPOSITORY / "think_vllm"))
                found += [(ours, name.name) for name in node.names]
    return found


def test_every_import_from_vllm_is_in_the_contract() -> None:
    contract = {
        name
        for path in Path(__file__).parent.glob("test_vllm_contract*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        # As a name, as an attribute of a module, or imported to be looked at by a test.
        if (name := getattr(node, "id", getattr(node, "attr", getattr(node, "name", None))))
    }
    found = imported_names()
    assert len(found) > 40
    missing = [(ours, name) for ours, name in found if name not in contract]
    assert not missing, f"add rows to tests/plugin/test_vllm_contract*.py for {missing}"


@dataclass
class Thing:
    size: int
    rows: list[int] = field(default_factory=list)

    def take(self, count: int, at: int = 0) -> None:
        self.size -= count
        self.rows.append(at)


@pytest.mark.parametrize(
    ("check", "expected", "changed", "message"),
    [
        (
            check_parameters,
            ["self", "count", "at"],
            ["self", "count"],
            r"takes \(self, count, at\)",
        ),
        (check_accepts, ["at"], ["where"], "no longer takes where"),
        (check_defaults, {"at": 0}, {"at": 1}, "has the defaults"),
    ],
    ids=["parameters", "accepts", "defaults"],
)
def test_changed_signature_is_named(
    check: Callable[..., None], expected: Any, changed: Any, message: str
) -> None:
    check("ours.py", Thing.take, expected)
    with pytest.raises(AssertionError, match=rf"{message}.*ours.py"):
        check("ours.py", Thing.take, changed)


def test_missing_member_is_named() -> None:
    check_members("ours.py", Thing, {"size", "rows", "take"})
    with pytest.raises(AssertionError, match=r"Thing no longer has columns, .*ours.py"):
        check_members("ours.py", Thing, {"size", "columns"})


def test_changed_source_is_named() -> None:
    check_source("ours.py", Thing.take, "self.size -= count", "self.rows.append(")
    with pytest.raises(AssertionError, match=r"'self.size -= count' where it was, .*ours.py"):
        check_source("ours.py", Thing.take, "self.rows.append(", "self.size -= count")
    with pytest.raises(AssertionError, match=r"no longer has 'self.size = 0', .*ours.py"):
        check_source("ours.py", Thing.take, "self.size = 0")


def test_members_are_those_of_constructors_too() -> None:
    from vllm.v1.request import Request

    assert {"num_prompt_tokens", "is_finished", "block_hashes"} <= members(Request)
    assert "columns" not in members(Request)
