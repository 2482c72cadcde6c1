"""The contract covers all imports from vLLM; its checks say what changed and who relies on it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.support import source
from tests.support.contract import check, rows
from think_vllm.hooks.patches import PATCHES


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
    folder = Path(__file__).parent
    table = (folder / "vllm_contract.txt").read_text(encoding="utf-8")
    contract = set(re.split(r"[^\w]+", table))
    for path in folder.glob("test_vllm_contract*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            # As a name, as an attribute of a module, imported by a test, or in a target.
            contract.add(getattr(node, "id", getattr(node, "attr", getattr(node, "name", ""))))
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                contract |= set(re.split(r"[^\w]+", node.value))
    for patch in PATCHES:
        contract |= set(re.split(r"[^\w]+", patch.target))
    found = imported_names()
    assert len(found) > 40
    missing = [(ours, name) for ours, name in found if name not in contract]
    assert not missing, f"add rows to tests/plugin/vllm_contract.txt for {missing}"


#: A vLLM of one module, and one that it imports from.
FILES = {
    "things": """
from dataclasses import dataclass
from vllm.base import Base

@dataclass
class Thing(Base):
    size: int
    rows: list[int] = None

    def __post_init__(self) -> None:
        self.width, self.height[0] = 1, 2
        if self.depth == 3:
            self.total: int = 4

    def take(self, count: int, at: int = 0) -> None:
        self.size -= count
        self.rows.append(at)
""",
    "base": """
class Base:
    KIND = "base"
    name: str

    @classmethod
    def make(cls, size, *, rows=()):
        return cls(size, rows)
""",
    "moved": "from vllm.things import Thing as Old",
}


@pytest.fixture(autouse=True)
def small_vllm(tmp_path: Path) -> Iterator[None]:
    (tmp_path / "vllm").mkdir()
    for name, text in FILES.items():
        (tmp_path / "vllm" / f"{name}.py").write_text(text, encoding="utf-8")
    caches = (source.module_file, source.module_text, source.module_tree)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(source.VARIABLE, str(tmp_path))
        for cache in caches:
            cache.cache_clear()
        yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize(
    ("use", "pieces"),
    [
        ("things:Thing.take(self, count, at=0)", []),
        ("things:Thing.take(..., at)", []),
        ("base:Base.make(size, rows=())", []),
        ("things:Thing(..., name, size, rows)", []),
        ("things:Thing{size, rows, take, make, KIND, name, width, total}", []),
        ("things:Thing extends base:Base", []),
        ("things:Thing.take", ["self.size -= count", "self.rows.add( | self.rows.append("]),
    ],
)
def test_what_is_there_is_found(use: str, pieces: list[str]) -> None:
    check("ours.py", use, pieces)


@pytest.mark.parametrize(
    ("use", "pieces", "message"),
    [
        ("things:Thing.take(self, count)", [], r"takes \(self, count, at=0\)"),
        ("things:Thing.take(self, count, at=1)", [], r"takes \(self, count, at=0\)"),
        ("things:Thing.take(..., where)", [], "no longer takes where"),
        ("things:Thing{size, height}", [], "Thing no longer has height"),
        ("things:Thing{size, depth}", [], "Thing no longer has depth"),
        ("base:Base extends things:Thing", [], "base:Base is no things:Thing"),
        (
            "things:Thing.take",
            ["self.rows.append(", "self.size -= count"],
            "'self.size -= count' where it was, ",
        ),
        ("things:Thing.take", ["self.size = 0"], "no longer has 'self.size = 0', "),
    ],
)
def test_what_has_changed_is_named(use: str, pieces: list[str], message: str) -> None:
    with pytest.raises(AssertionError, match=rf"{message}.*ours.py"):
        check("ours.py", use, pieces)


def test_rows_of_a_table_name_file_and_class() -> None:
    table = """
a.py
    things:Thing{size}
    # A comment.
    .take(self, \
        count)
b.py
    .make
        cls(
        rows
"""
    assert [row.values for row in rows(table)] == [
        ("a.py", "things:Thing{size}", []),
        ("a.py", "things:Thing.take(self, count)", []),
        ("b.py", "things:Thing.make", ["cls(", "rows"]),
    ]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere:Thing", "no module vllm.nowhere"),
        ("things:Other", "vllm.things has no Other"),
        ("things:Thing.give", "Thing has no give"),
        ("nowhere:Thing | things:Other", "vllm.things has no Other"),
    ],
)
def test_missing_target_is_named(target: str, message: str) -> None:
    with pytest.raises(source.NotThereError, match=message):
        source.find(target)


@pytest.mark.parametrize("target", ["moved:Old", "nowhere:Thing | things:Thing"])
def test_moved_target_is_found(target: str) -> None:
    found = source.find(target)
    assert (found.module, found.name) == ("vllm.things", "Thing")
