"""Rules for the kernels' sources that neither the interpreter nor today's Triton would tell."""

import ast
from collections.abc import Iterator
from pathlib import Path

import csrc_triton
from tests.conftest import REPOSITORY

SOURCES = sorted((REPOSITORY / csrc_triton.__name__).glob("*.py"))


def functions(source: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            yield node


def decorators(function: ast.FunctionDef) -> list[str]:
    return [ast.unparse(decorator).partition("(")[0] for decorator in function.decorator_list]


def test_compile_time_numbers_come_from_functions_that_are_compile_time() -> None:
    # Triton 3.6 makes a run-time value of whatever a jit function returns.
    found = []
    for source in SOURCES:
        for function in functions(source):
            kinds = [ast.unparse(x.annotation) for x in function.args.args if x.annotation]
            constant = kinds == ["tl.constexpr"] * len(function.args.args)
            makes_tensors = "tl." in "".join(map(ast.unparse, function.body))
            if "triton.jit" in decorators(function) and constant and not makes_tensors:
                found.append(f"{source.name}: {function.name}")
    assert found == []


def test_every_kernel_that_is_launched_tells_no_integers_apart() -> None:
    launched, declared = set(), set()
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched.add((source.name, ast.unparse(node.func.value)))
        declared |= {
            (source.name, function.name)
            for function in functions(source)
            if "kernel" in decorators(function)
        }
    assert len(launched) >= 12
    assert launched <= declared
