"""Comparing vLLM with what we rely on, and naming which of our files does.

What is compared is a target (``source.py``), read in vLLM's files.
"""

import ast
import importlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from tests.support import source
from tests.support.source import find


def name_of(value: Any) -> str | None:
    """Id of a parameter: the name in a target, what other strings say, nothing of tables."""
    return value.rpartition(":")[2] if isinstance(value, str) else None


def check_parameters(ours: str, target: str, expected: Sequence[str]) -> None:
    """Compare the names and the order of all parameters."""
    found = list(source.parameters(find(target)))
    assert found == list(expected), (
        f"vLLM's {target} takes ({', '.join(found)}), {ours} relies on ({', '.join(expected)})"
    )


def check_accepts(ours: str, target: str, names: Collection[str]) -> None:
    """Look for parameters that we pass by name."""
    missing = set(names) - set(source.parameters(find(target)))
    assert not missing, (
        f"vLLM's {target} no longer takes {', '.join(sorted(missing))}, which {ours} passes"
    )


def check_defaults(ours: str, target: str, expected: Mapping[str, Any]) -> None:
    """Compare defaults, which are literals, that we rely on by leaving an argument out."""
    taken = source.parameters(find(target))
    found = {name: taken.get(name) for name in expected}
    assert found == {name: ast.unparse(ast.parse(repr(x))) for name, x in expected.items()}, (
        f"vLLM's {target} has the defaults {found}, {ours} relies on {expected}"
    )


def check_members(ours: str, target: str, expected: Collection[str]) -> None:
    """Look for names of a class or an enumeration."""
    missing = set(expected) - source.members(find(target))
    assert not missing, f"vLLM's {target} no longer has {', '.join(sorted(missing))}: {ours}"


def check_base(ours: str, target: str, base: str) -> None:
    """Look for a class among those that another one inherits from."""
    wanted = find(base).node
    assert any(kind.node is wanted for kind in source.bases(find(target))), (
        f"vLLM's {target} is no {base} any more, {ours} relies on it"
    )


def check_source(ours: str, target: str, *pieces: str | tuple[str, ...]) -> None:
    """Look for pieces of a definition, white space aside, in this order.

    A piece that differs between series is a tuple of its forms.
    """
    found, start = source.text(find(target)), 0
    for piece in pieces:
        forms = [piece] if isinstance(piece, str) else list(piece)
        wanted = ["".join(form.split()) for form in forms]
        places = [(found.find(form, start), form) for form in wanted if form in found[start:]]
        assert places, (
            f"vLLM's {target} no longer has {' or '.join(map(repr, forms))}"
            f"{' where it was' if any(form in found for form in wanted) else ''}, "
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
