"""The table of patches: it holds in the installed vLLM, and nothing of ours goes past it."""

import argparse
import ast
import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.platforms.interface import Platform

from tests.conftest import REPOSITORY
from tests.support.checks import EAGER
from tests.support.engine import Engine, engine_process
from think_vllm.hooks.installation import installed, wrap_method
from think_vllm.hooks.patches import PATCHES
from think_vllm.hooks.patches import patch as patch_module
from think_vllm.hooks.patches.patch import Kind, Patch, Role

#: Rooms that run in vLLM's processes.
ROOMS = ("hooks", "metrics", "scheduler", "worker")
INSTALLATION = "hooks.installation"


def role_targets(*roles: Role) -> set[str]:
    return {patch.target for patch in PATCHES if patch.role in roles}


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target.rpartition(".")[2])
def test_installed_vllm_has_what_the_table_names(patch: Patch) -> None:
    assert patch.problem() is None, f"think_vllm.{patch.where} relies on {patch.target}"


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target.rpartition(".")[2])
def test_our_side_is_where_the_table_says(patch: Patch) -> None:
    assert (patch.role is not None) is (patch.kind is Kind.WRAPPED)
    module, _, function = patch.where.partition(":")
    assert importlib.util.find_spec(f"think_vllm.{module}") is not None
    if patch.kind is Kind.WRAPPED:
        wrapper = getattr(importlib.import_module(f"think_vllm.{module}"), function)
        assert next(iter(inspect.signature(wrapper).parameters)) == "original"


def test_platforms_of_other_devices_have_what_is_wrapped() -> None:
    for patch in PATCHES:
        if patch.target.startswith("vllm.platforms:current_platform."):
            name = patch.name.rpartition(".")[2]
            assert isinstance(inspect.getattr_static(Platform, name), classmethod)
            assert tuple(inspect.signature(getattr(Platform, name)).parameters) == patch.parameters


# -- Nothing goes past the table ----------------------------------------------------------------


def our_modules() -> Iterator[tuple[str, ast.Module]]:
    folder = REPOSITORY / "think_vllm"
    paths = [folder / "plugin.py", *(path for room in ROOMS for path in (folder / room).rglob("*"))]
    for path in paths:
        if path.suffix == ".py":
            name = ".".join(path.relative_to(folder).with_suffix("").parts)
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def own_names() -> set[str]:
    """Functions, classes, variables and attributes that our classes define."""
    names: set[str] = set()
    for _, tree in our_modules():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif is_set(node) and is_self(node):
                names.add(node.attr)
    return names


def is_set(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del))


def is_self(node: Any) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id == "self"


def table_names(*kinds: Kind) -> dict[str, set[str]]:
    """Names of the table, each with those of our modules that use it."""
    names: dict[str, set[str]] = {}
    for patch in PATCHES:
        if patch.kind in kinds:
            for name in (patch.name.rpartition(".")[2], *patch.members):
                names.setdefault(name, set()).add(patch.where.partition(":")[0])
    return names


def is_listed(module: str, places: set[str]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def test_only_the_installation_replaces_methods() -> None:
    wrapped = {patch.name.rpartition(".")[2] for patch in PATCHES if patch.kind is Kind.WRAPPED}
    for module, tree in our_modules():
        if module == INSTALLATION:
            continue
        from_vllm = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm")
            for alias in node.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("setattr", "delattr"), f"{module}:{node.lineno}"
            if isinstance(node, ast.Attribute) and is_set(node):
                assert node.attr not in wrapped, f"{module}:{node.lineno}"
                owner = ast.unparse(node.value).split(".")[0]
                assert owner not in from_vllm, f"{module}:{node.lineno} sets {owner}.{node.attr}"


def test_attributes_of_vllm_are_set_where_the_table_says() -> None:
    listed, ours = table_names(Kind.SET, Kind.WRAPPED), own_names()
    for module, tree in our_modules():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or not is_set(node) or is_self(node):
                continue
            if node.attr.startswith("think_vllm_") or node.attr == "additional_config":
                continue  # ours on an object of vLLM; of argparse's result
            where = f"{module}:{node.lineno} sets {ast.unparse(node)}"
            if node.attr in listed:
                assert is_listed(module, listed[node.attr]), where
            else:
                assert node.attr in ours, where


def test_private_names_of_vllm_are_used_where_the_table_says() -> None:
    listed, ours = table_names(*Kind), own_names()
    for module, tree in our_modules():
        for node in ast.walk(tree):
            name = node.attr if isinstance(node, ast.Attribute) else ""
            if not name.startswith("_") or name.startswith("__") or name in ours - set(listed):
                continue
            if hasattr(argparse, name) or name in vars(argparse.ArgumentParser()):
                continue  # of Python
            where = f"{module}:{node.lineno} uses {ast.unparse(node)}"
            assert is_listed(module, listed.get(name, set())), where


# -- Installing ---------------------------------------------------------------------------------


class Base:
    vllm_config: Any = None

    def method(self, count: int) -> int:
        return count

    @classmethod
    def make(cls, count: int) -> tuple[str, int]:
        return cls.__name__, count


def doubled(original: Any, owner: Any, count: int) -> Any:
    return original(owner, 2 * count)


def test_wrapping_is_done_once_and_in_the_class_itself() -> None:
    class Child(Base):
        pass

    for _ in range(2):
        wrap_method(Child(), "method", doubled)
        wrap_method(Child, "make", doubled)
    assert (Child().method(3), Child.make(3)) == (6, ("Child", 6))
    assert (Base().method(3), Base.make(3)) == (3, ("Base", 3))
    assert list(inspect.signature(Child.method).parameters) == ["self", "count"]


@pytest.mark.slow
def test_a_process_has_the_wrappers_of_its_role(recall_model: Path) -> None:
    everywhere = role_targets(Role.PLUGIN, Role.BACKEND, Role.PARSER)
    thin = role_targets(Role.FRONT_END, Role.REPORTS, Role.SCHEDULER, Role.WORKER_V1)
    with engine_process() as process:
        Engine(process, recall_model, EAGER)
        assert set(process.submit(installed).result()) == everywhere
        # Front end, scheduler and worker share a process here.
        Engine(process, recall_model, [*EAGER, "--kv-channel-prune", "0.5"])
        assert set(process.submit(installed).result()) == everywhere | thin


# -- What is missing ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "settings", "message"),
    [
        ("nowhere:Thing", {}, "there is no nowhere:Thing"),
        ("argparse:Nothing.take", {}, "there is no argparse:Nothing.take"),
        ("argparse:ArgumentParser.give", {}, "there is no argparse:ArgumentParser.give"),
        ("nowhere:x | argparse:ArgumentParser.exit", {}, None),
        ("argparse:ArgumentParser.prog", {"members": ("usage",)}, None),  # of instances
        ("argparse:Action.format_usage", {"members": ("dest", "x")}, "Action has no x"),
        ("argparse:ArgumentParser", {"members": ("x", "y")}, "ArgumentParser has no x, y"),
        (
            "argparse:ArgumentParser.exit",
            {"parameters": ("self", "status")},
            r"takes \(self, status, message\), not \(self, status\)",
        ),
    ],
)
def test_what_a_vllm_lacks_is_named(target, settings, message):
    problem = Patch(target, Kind.READ, "hooks", "", "", **settings).problem()
    if message is None:
        assert problem is None
    else:
        assert problem is not None
        with pytest.raises(ValueError, match=message):
            raise ValueError(problem)


def test_targets_are_located_by_their_newest_place() -> None:
    owner, name = patch_module.locate("argparse:ArgumentParser.exit | argparse:Action.exit")
    assert (owner, name) == (argparse.ArgumentParser, "exit")
