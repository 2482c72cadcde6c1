"""Comparing vLLM with what we rely on, and naming which of our files does."""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any


def name_of(value: Any) -> str | None:
    """Id of a parameter: its qualified name if it has one, none for tables beside it."""
    return getattr(value, "__qualname__", None) or getattr(value, "__name__", None)


def check_parameters(ours: str, function: Callable[..., Any], expected: Sequence[str]) -> None:
    """Compare the names and the order of all parameters."""
    found = list(inspect.signature(function).parameters)
    assert found == list(expected), (
        f"vLLM's {name_of(function)} takes ({', '.join(found)}), {ours} relies on "
        f"({', '.join(expected)})"
    )


def check_accepts(ours: str, function: Callable[..., Any], names: Collection[str]) -> None:
    """Look for parameters that we pass by name."""
    missing = set(names) - set(inspect.signature(function).parameters)
    assert not missing, (
        f"vLLM's {name_of(function)} no longer takes {', '.join(sorted(missing))}, which {ours} "
        "passes"
    )


def members(kind: Any) -> set[str]:
    """Fields, attributes and annotated names of a class, those set in its constructor included."""
    found = {*dir(kind), *getattr(kind, "model_fields", {})}
    for base in getattr(kind, "__mro__", ()):
        found |= set(vars(base).get("__annotations__", ()))
    if dataclasses.is_dataclass(kind):
        found |= {field.name for field in dataclasses.fields(kind)}
    if inspect.isclass(kind):
        for base in kind.__mro__:
            for name in ("__init__", "__post_init__"):
                if name in vars(base) and base.__module__.startswith("vllm"):
                    found |= set(_assigned(vars(base)[name]))
    return found


def _assigned(function: Callable[..., Any]) -> list[str]:
    """Names of attributes that a method sets."""
    try:
        source = tight(function)
    except OSError:  # made by dataclasses
        return []
    parts = source.split("self.")[1:]
    names = []
    for part in parts:
        name = part[: next((i for i, c in enumerate(part) if not (c == "_" or c.isalnum())), None)]
        if part[len(name) : len(name) + 1] in ("=", ":") and part[len(name) :][:2] != "==":
            names.append(name)
    return names


def check_members(ours: str, kind: Any, expected: Collection[str]) -> None:
    """Look for names of a class, an enumeration or a module."""
    missing = set(expected) - members(kind)
    assert not missing, (
        f"vLLM's {name_of(kind)} no longer has {', '.join(sorted(missing))}, which {ours} uses"
    )


def check_defaults(ours: str, function: Callable[..., Any], expected: dict[str, Any]) -> None:
    """Compare defaults that we rely on by leaving an argument out."""
    parameters = inspect.signature(function).parameters
    found = {name: parameters[name].default for name in expected if name in parameters}
    assert found == expected, (
        f"vLLM's {name_of(function)} has the defaults {found}, {ours} relies on {expected}"
    )


def tight(function: Any) -> str:
    """Source without white space."""
    return "".join(inspect.getsource(function).split())


def check_source(ours: str, function: Any, *pieces: str) -> None:
    """Look for pieces of a function's source, white space aside, in this order."""
    source, start = tight(function), 0
    for piece in pieces:
        wanted = "".join(piece.split())
        at = source.find(wanted, start)
        assert at >= 0, (
            f"vLLM's {name_of(function)} no longer has {piece!r}"
            f"{' where it was' if wanted in source else ''}, which {ours} relies on"
        )
        start = at + len(wanted)
