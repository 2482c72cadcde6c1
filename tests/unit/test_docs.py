"""The pages name files, modules, tests and headings that exist."""

import ast
import re
from functools import lru_cache
from pathlib import Path

import pytest

from scripts.flags_page import PAGE, with_table
from think_vllm.tools.cli import main

REPOSITORY = Path(__file__).parents[2]
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")),
    *(page for page in (REPOSITORY / "docs").rglob("*.md") if "results" not in page.parts),
]
#: Files that readers make.
MADE = {"bench/out/", "deploy/.env"}
#: Folders from which pages name files.
ROOTS = (REPOSITORY, REPOSITORY / "think_vllm", REPOSITORY / "tests", REPOSITORY / "docs")
PACKAGES = ("think_vllm", "csrc_triton", "bench", "scripts", "tests", "models")
FOLDERS = (*PACKAGES, "configs", "deploy", "docs", "hooks", "kernels", "metrics", "plan")
FOLDERS += ("plugin", "scheduler", "tools", "worker", "unit", "engine", "e2e", "triton")

_FILE = re.compile(rf"(?<![\w./-])((?:{'|'.join(FOLDERS)})/[\w./*-]*\w[\w/*]*)(?:::([\w:]+))?")
_DOTTED = re.compile(rf"(?<![\w./-])((?:{'|'.join(PACKAGES)})(?:\.\w+)+)")
_LINK = re.compile(r"\]\(([^)\s:]*?)(?:#([\w-]+))?\)")
_CODE = re.compile(r"```.*?```|`[^`]+`", re.DOTALL)


@lru_cache
def names_of(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = (ast.FunctionDef, ast.ClassDef)
    found = {node.name for node in ast.walk(tree) if isinstance(node, named)}
    found |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return frozenset(found)


@lru_cache
def anchors_of(path: Path) -> frozenset[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return frozenset(heading.replace(" ", "-") for heading in plain)


def missing_file(name: str, inner: str) -> bool:
    for root in ROOTS:
        for path in root.glob(name):
            if not inner or all(part in names_of(path) for part in inner.split("::")):
                return False
    return True


def missing_name(dotted: str) -> bool:
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        module = REPOSITORY.joinpath(*parts[:length])
        if module.is_dir() or module.suffix:
            return length < len(parts)
        if module.with_suffix(".py").is_file():
            return not all(name in names_of(module.with_suffix(".py")) for name in parts[length:])
    return True


def code_in(text: str) -> str:
    return "\n".join(_CODE.findall(text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_exist(page: Path) -> None:
    code = code_in(page.read_text(encoding="utf-8"))
    missing = {name for name, inner in _FILE.findall(code) if missing_file(name, inner)}
    missing |= {name for name in _DOTTED.findall(code) if missing_name(name)}
    assert not missing - MADE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target, anchor in _LINK.findall(page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (anchor and anchor not in anchors_of(path)):
            broken.append((target, anchor))
    assert not broken


@pytest.mark.parametrize(
    "name",
    ["think_vllm/plan/nowhere.py", "plan/layout.py::Nowhere", "engine/test_windows.py::test_no"],
)
def test_missing_files_are_noticed(name: str) -> None:
    assert missing_file(*_FILE.findall(name)[0])


@pytest.mark.parametrize("name", ["think_vllm.plan.nowhere", "think_vllm.plan.layout.Nowhere"])
def test_missing_names_are_noticed(name: str) -> None:
    assert missing_name(*_DOTTED.findall(name))


def folders_in(path: Path) -> list[str]:
    """Packages below a folder."""
    return [str(x.parent.relative_to(path)) for x in path.rglob("__init__.py") if x.parent != path]


def test_contributing_says_what_to_run_for_each_folder() -> None:
    page = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = {name.partition("/")[0] for name in folders_in(REPOSITORY / "think_vllm")}
    assert [name for name in sorted(rooms) if f"`think_vllm/{name}/`" not in page] == []


def test_unit_tests_lie_where_the_source_lies() -> None:
    sources = (REPOSITORY / "think_vllm", REPOSITORY)
    unit = folders_in(REPOSITORY / "tests" / "unit")
    assert [name for name in unit if not any((x / name).is_dir() for x in sources)] == []


def test_flags_page_is_fresh() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_table(page), "run python -m scripts.flags_page"


def test_plan_prints_what_the_readme_shows(monkeypatch, capsys):
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"```console\n\$ think-vllm (plan .*)\n([^`]*)```", readme)
    assert shown
    monkeypatch.chdir(REPOSITORY)
    assert main(shown[1].split()) == 0
    assert capsys.readouterr().out == shown[2]
