"""Kernels are compiled for GPUs that need not be there, in a process that compiles."""

import os
import re
import subprocess

import pytest

from tests.conftest import REPOSITORY
from tests.support.processes import run_python
from think_vllm.plan.formats import FORMATS

#: Everything that a process prints which compiles the kernels of one format.
SCRIPT = """
import sys, torch
from csrc_triton import aot

plan = next(aot.make_plans([sys.argv[1]], torch.bfloat16, 64, 0.5, float(sys.argv[3])))
for case in aot.cases(plan, torch.bfloat16, ["store", "scores", "compact"]):
    made = aot.compile_case(case, int(sys.argv[2]))
    print(made.name, made.registers, made.spill_bytes)
    if made.name == "compact_kernel":
        print(made.ptx)
"""


def run(
    *arguments: str, interpret: bool = False, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    return run_python(*arguments, cwd=REPOSITORY, env=environment, timeout=timeout)


def compiled(printed: subprocess.CompletedProcess[str]) -> list[str]:
    """Names of kernels that a script has compiled, all of which fit and round."""
    assert printed.returncode == 0, printed.stderr
    taken = re.findall(r"^(\w+_kernel\S*) (\d+) (\d+)$", printed.stdout, re.MULTILINE)
    for name, registers, spill_bytes in taken:
        assert 0 < int(registers) < 255, name
        assert int(spill_bytes) == 0, name
    # Codes are the reference's to the bit only if nothing is flushed, fused or approximated.
    assert "div.rn.f32" in printed.stdout
    for inexact in (".ftz", "fma.rn.f32", ".approx", "div.full"):
        assert inexact not in printed.stdout, inexact
    return [name for name, _, _ in taken]


@pytest.mark.parametrize(
    ("quant", "capability", "value_ratio"), [("fp8", 90, 0.0), ("k4v2", 80, 0.3)]
)
def test_kernels_compile(quant: str, capability: int, value_ratio: float) -> None:
    printed = run("-c", SCRIPT, quant, str(capability), str(value_ratio))
    names = ("store", "clear", "chunk", "mean", "query", "compact")
    assert set(compiled(printed)) == {f"{name}_kernel" for name in names}
    assert "bar.sync" in printed.stdout


#: The same for static blocks, on both GPUs.
STATIC_SCRIPT = """
import torch
from csrc_triton import aot

for plan in aot.make_plans(aot.STATIC_FORMATS, torch.bfloat16, 128, 0.5, 0.3, static=True):
    for case in aot.cases(plan, torch.bfloat16):
        for capability in aot.CAPABILITIES:
            made = aot.compile_case(case, capability)
            print(f"{made.name}-{plan.format.name}-{capability}", made.registers, made.spill_bytes)
            if made.name == "static_store_kernel":
                print(made.ptx)
            if made.name == "static_decode_kernel":
                # Elements by 16 bytes, codes by 8, and none by itself.
                size = 16 if plan.format.name == "none" else 8
                assert f"], 0x{size:x}, " in made.ptx
"""


def test_kernels_over_static_blocks_compile() -> None:
    kinds = ("store", "decode", "combine", "context")
    assert set(compiled(run("-c", STATIC_SCRIPT))) == {
        f"static_{kind}_kernel-{quant}-{capability}"
        for kind in kinds
        for quant in ("none", "fp8")
        for capability in (80, 90)
    }


def table(*options: str) -> list[dict[str, str]]:
    """Rows of what the command prints."""
    printed = run("-m", "csrc_triton.aot", *options, timeout=1200)
    assert printed.returncode == 0, printed.stderr
    heading, *lines = (line.split() for line in printed.stdout.splitlines())
    assert heading[:3] == ["kernel", "format", "dtype"]
    return [dict(zip(heading, line, strict=True)) for line in lines]


@pytest.mark.slow
def test_every_kernel_fits_the_registers_of_both_gpus() -> None:
    rows = table()
    assert {row["gpu"] for row in rows} == {"sm_80", "sm_90"}
    assert {row["format"] for row in rows} == set(FORMATS)
    attention = [row for row in rows if row["kernel"] == "_attend"]
    # Decode, context over dense blocks, context behind thin ones; five formats; two GPUs.
    assert len(attention) == 3 * 5 * 2
    assert [row for row in rows if int(row["spills"])] == []


def test_wide_heads_fit_the_shared_memory_of_small_gpus() -> None:
    options = "--module decode context --head-size 256 --format none fp8 kivi4 --capability 80"
    taken = [int(row["shared"]) for row in table(*options.split()) if row["kernel"] == "_attend"]
    assert len(taken) == 9
    # Compute capability 8.6 and 8.9.
    assert max(taken) <= 99 * 1024


def test_attention_over_pruned_values_compiles() -> None:
    options = "--module decode --format k4v2 --capability 80 --value-ratio 0.3"
    spills = {row["kernel"]: int(row["spills"]) for row in table(*options.split())}
    assert spills == {"_attend": 0, "_combine": 0}


def test_compiling_rejects_to_interpret() -> None:
    rejected = run("-m", "csrc_triton.aot", "--module", "store", "--format", "none", interpret=True)
    assert rejected.returncode != 0
    assert "TRITON_INTERPRET is set; unset it" in rejected.stderr
