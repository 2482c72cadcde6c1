"""Which tests a run takes, ``--tier``, and what it leaves out, said in its closing lines."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Tier:
    """What a run leaves out."""

    marks: frozenset[str] = frozenset()
    folders: frozenset[str] = frozenset()  # of tests/, not even collected
    rest: str = ""  # what runs it


TIERS = {
    "quick": Tier(
        frozenset({"e2e", "slow", "extended"}),
        frozenset({"kernels", "triton", "engine", "e2e"}),
        "make test",
    ),
    "usual": Tier(frozenset({"extended"}), rest="make test-all"),
    "all": Tier(),
}
#: Tests that were left out, by file.
_left_out: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    help_text = "which tests: quick ones, what `make test` runs, or all (%(default)s)"
    parser.addoption("--tier", choices=list(TIERS), default="all", help=help_text)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    tier = TIERS[config.getoption("tier")]
    return True if collection_path in {TESTS / folder for folder in tier.folders} else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tier = TIERS[config.getoption("tier")]
    left = [item for item in items if tier.marks & {mark.name for mark in item.iter_markers()}]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]
        _left_out.update(item.nodeid.partition("::")[0] for item in left)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(_left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    # Of pytest-xdist's workers each has collected everything.
    if hasattr(node, "workeroutput"):
        _left_out.update(Counter(node.workeroutput["left_out"]) - _left_out)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    lines = list(closing_lines(TIERS[config.getoption("tier")], _left_out))
    if lines:
        terminalreporter.section("left out")
        for line in lines:
            terminalreporter.write_line(line)


def closing_lines(tier: Tier, left_out: Counter[str]) -> Iterable[str]:
    """What a run has left out, and how to run it."""
    if tier.folders:
        yield f"folders: {', '.join(f'tests/{folder}' for folder in sorted(tier.folders))}"
    for file, count in sorted(left_out.items()):
        yield f"{file}: {count} {'test' if count == 1 else 'tests'}"
    if tier.folders or left_out:
        yield f"`{tier.rest}` runs them"
