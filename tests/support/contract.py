"""Comparing vLLM with what we rely on, and naming which of our files does.

What we rely on is a table of text: our file, below it what it uses of vLLM, below that pieces of
the source. A target is one of ``source.py``; of the class above it if it begins with a point::

    scheduler/copies.py
        v1.core.block_pool:BlockPool{null_block, blocks}
        .touch(self, blocks)
        v1.core.sched.scheduler:Scheduler._preempt_request
            request.num_computed_tokens = 0
"""

import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.support import source
from tests.support.source import find

_CLASS = re.compile(r"[\w.]+:\w+")
_USE = re.compile(
    r"(?P<target>[^({]+?)"
    r"(?: extends (?P<base>.+)|\((?P<parameters>.*)\)|\{(?P<members>.*)\})?"
)


def rows(table: str) -> list[Any]:
    """Read a table as parameters ``ours``, ``use`` and ``pieces`` of a test."""
    found: list[tuple[str, str, list[str]]] = []
    ours = owner = ""
    for line in table.replace("\\\n", "").splitlines():
        text = " ".join(line.split())
        if not text or text.startswith("#"):
            continue
        if line.startswith(8 * " "):
            found[-1][2].append(text)
        elif line.startswith(4 * " "):
            named = _CLASS.match(text)
            owner = named[0] if named else owner
            found.append((ours, text if named else owner + text, []))
        else:
            ours = text
    return [pytest.param(*row, id=row[1].rpartition(":")[2]) for row in found]


def check(ours: str, use: str, pieces: Sequence[str] = ()) -> None:
    """Compare what one of our files uses with vLLM.

    Args:
        ours: The file.
        use: A target, alone or with ``(a, b=1)``, all its parameters in order, with the defaults
            that we rely on; ``(..., a, b)``, parameters among others that we pass by name;
            ``{a, b}``, members of a class or an enumeration; `` extends target``, a base.
        pieces: Of its source, white space aside, in this order; ``new | old`` where series differ.
    """
    match = _USE.fullmatch(use)
    assert match, use
    target = match["target"]
    if match["base"]:
        wanted = find(match["base"]).node
        assert any(kind.node is wanted for kind in source.bases(find(target))), (
            f"vLLM's {target} is no {match['base']} any more, {ours} relies on it"
        )
    elif match["members"]:
        missing = set(_names(match["members"])) - source.members(find(target))
        assert not missing, f"vLLM's {target} no longer has {', '.join(sorted(missing))}: {ours}"
    elif match["parameters"] is not None:
        _check_parameters(ours, target, _names(match["parameters"]))
    else:
        _check_source(ours, target, pieces)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")] if text else []


def _check_parameters(ours: str, target: str, expected: list[str]) -> None:
    taken = source.parameters(find(target))
    if expected[:1] == ["..."]:
        missing = set(expected[1:]) - set(taken)
        assert not missing, (
            f"vLLM's {target} no longer takes {', '.join(sorted(missing))}, which {ours} passes"
        )
        return
    full = {
        name: name if default is None else f"{name}={default}" for name, default in taken.items()
    }
    same = len(taken) == len(expected) and all(
        wanted in (name, shown)
        for wanted, (name, shown) in zip(expected, full.items(), strict=True)
    )
    assert same, (
        f"vLLM's {target} takes ({', '.join(full.values())}), "
        f"{ours} relies on ({', '.join(expected)})"
    )


def _check_source(ours: str, target: str, pieces: Sequence[str]) -> None:
    found, start = source.text(find(target)), 0
    for piece in pieces:
        forms = ["".join(form.split()) for form in piece.split(" | ")]
        places = [(found.find(form, start), form) for form in forms if form in found[start:]]
        assert places, (
            f"vLLM's {target} no longer has {piece!r}"
            f"{' where it was' if any(form in found for form in forms) else ''}, "
            f"which {ours} relies on"
        )
        at, form = min(places)
        start = at + len(form)


def tight(function: Callable[..., Any]) -> str:
    """Source of what was imported, without white space."""
    return "".join(inspect.getsource(function).split())


def planning() -> Any:
    """Module with vLLM's grouping of layers: its place since 0.33, or the one before."""
    try:
        return importlib.import_module("vllm.v1.core.kv_cache_planning")
    except ModuleNotFoundError:
        return importlib.import_module("vllm.v1.core.kv_cache_utils")
