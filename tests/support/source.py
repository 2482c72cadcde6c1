"""The Python files of a vLLM, read and not imported: what a series has is seen without its build.

A target is ``"module.of.vllm:Name.method"``; of a name that moved, ``"new | old"``. Classes have
what they inherit from other classes of vLLM, and nothing that comes from elsewhere (torch, enum).
"""

import ast
import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
#: Folder that holds ``vllm``; unset: where the installed one is.
VARIABLE = "VLLM_SOURCE"


class NotThereError(LookupError):
    """A module or a name that this vLLM does not have."""


@dataclass(frozen=True)
class Found:
    """A definition, and the module that it stands in."""

    module: str
    name: str
    node: Definition


def source_folder() -> Path:
    """Folder that holds the package ``vllm``."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent.parent


@functools.cache
def module_file(module: str) -> Path:
    """File of a module.

    Raises:
        NotThereError: If there is none.
    """
    path = source_folder().joinpath(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    raise NotThereError(f"vLLM has no module {module}")


@functools.cache
def module_text(module: str) -> str:
    """Source of a module."""
    return module_file(module).read_text(encoding="utf-8")


@functools.cache
def module_tree(module: str) -> ast.Module:
    """Syntax tree of a module."""
    return ast.parse(module_text(module))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a body and of the branches in it, but not of definitions."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            for part in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, part, []))


def find(target: str) -> Found:
    """Find what a target names, following imports and inheritance within vLLM.

    Raises:
        NotThereError: If this vLLM has it in none of its places.
    """
    *newer, oldest = target.split(" | ")
    for place in newer:
        with contextlib.suppress(NotThereError):
            return _find(place)
    return _find(oldest)


def _find(target: str) -> Found:
    module, _, path = target.partition(":")
    first, *rest = path.split(".")
    found = _in_module(f"vllm.{module}", first, frozenset())
    for name in rest:
        found = _in_class(found, name, target)
    return found


def _in_module(module: str, name: str, seen: frozenset[tuple[str, str]]) -> Found:
    if (module, name) in seen:
        raise NotThereError(f"vLLM's {module} has no {name}")
    for node in _statements(module_tree(module).body):
        if isinstance(node, Definition) and node.name == name:
            return Found(module, name, node)
        if isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name and (node.module or "").startswith("vllm"):
                    return _in_module(str(node.module), alias.name, seen | {(module, name)})
    raise NotThereError(f"vLLM's {module} has no {name}")


def _in_class(owner: Found, name: str, target: str) -> Found:
    for kind in bases(owner):
        for node in _statements(kind.node.body):
            if isinstance(node, Definition) and node.name == name:
                return Found(kind.module, f"{kind.name}.{name}", node)
    raise NotThereError(f"vLLM's {owner.name} has no {name} ({target})")


def bases(kind: Found) -> list[Found]:
    """A class, then what it inherits from within vLLM."""
    assert isinstance(kind.node, ast.ClassDef), f"{kind.name} is no class"
    found = [kind]
    for base in kind.node.bases:
        plain = base.value if isinstance(base, ast.Subscript) else base
        try:
            if isinstance(plain, ast.Name):
                found += bases(_in_module(kind.module, plain.id, frozenset()))
        except NotThereError:
            continue  # from another package
    return found


def parameters(found: Found) -> dict[str, str | None]:
    """Parameters with the source of their defaults, as ``inspect.signature`` counts them.

    A class takes what its constructor takes, or has the fields of its bases and its own.
    """
    node = found.node
    if isinstance(node, ast.ClassDef):
        try:
            taken = parameters(_in_class(found, "__init__", found.name))
        except NotThereError:
            return {name: None for kind in reversed(bases(found)) for name in fields(kind)}
        return dict(list(taken.items())[1:])
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    given = [*zip(positional, [*missing, *arguments.defaults], strict=True)]
    if any(isinstance(x, ast.Name) and x.id == "classmethod" for x in node.decorator_list):
        given = given[1:]
    if arguments.vararg:
        given.append((arguments.vararg, None))
    given += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    if arguments.kwarg:
        given.append((arguments.kwarg, None))
    return {argument.arg: default and ast.unparse(default) for argument, default in given}


def fields(kind: Found) -> list[str]:
    """Names that a class annotates in its body."""
    return [
        node.target.id
        for node in _statements(kind.node.body)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]


def members(found: Found) -> set[str]:
    """What a class has: fields, methods, constants and what constructors set."""
    names: set[str] = set()
    for kind in bases(found):
        names |= set(fields(kind))
        for node in _statements(kind.node.body):
            if isinstance(node, Definition):
                names.add(node.name)
                if node.name in ("__init__", "__post_init__"):
                    names |= _set_on_self(node)
            elif isinstance(node, ast.Assign):
                names |= {x.id for x in node.targets if isinstance(x, ast.Name)}
    return names


def _set_on_self(node: Definition) -> set[str]:
    return {
        x.attr
        for x in ast.walk(node)
        if isinstance(x, ast.Attribute)
        and isinstance(x.ctx, ast.Store)
        and isinstance(x.value, ast.Name)
        and x.value.id == "self"
    }


def text(found: Found) -> str:
    """Source of a definition, without white space."""
    segment = ast.get_source_segment(module_text(found.module), found.node)
    assert segment is not None
    return "".join(segment.split())
