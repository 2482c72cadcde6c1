"""Kernels are compiled for GPUs that need not be there, in a process that compiles."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
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
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.parametrize(
    ("quant", "capability", "value_ratio"), [("fp8", 90, 0.0), ("k4v2", 80, 0.3)]
)
def test_kernels_compile(quant: str, capability: int, value_ratio: float) -> None:
    made = run("-c", SCRIPT, quant, str(capability), str(value_ratio))
    assert made.returncode == 0, made.stderr
    taken = re.findall(r"^(\w+_kernel) (\d+) (\d+)$", made.stdout, re.MULTILINE)
    names = {name for name, _, _ in taken}
    assert names == {
        "store_kernel", "clear_kernel", "chunk_kernel", "mean_kernel", "query_kernel",
        "compact_kernel",
    }  # fmt: skip
    for name, registers, spill_bytes in taken:
        assert 0 < int(registers) < 255, name
        assert int(spill_bytes) == 0, name
    # Codes are the reference's to the bit only if nothing is flushed, fused or approximated.
    assert "div.rn.f32" in made.stdout
    assert "bar.sync" in made.stdout
    for inexact in (".ftz", "fma.rn.f32", ".approx", "div.full"):
        assert inexact not in made.stdout, inexact


#: The same for static blocks, on both GPUs.
STATIC_SCRIPT = """
import torch
from csrc_triton import aot

for plan in aot.make_static_plans(aot.STATIC_FORMATS, torch.bfloat16, 128, 0.5, 0.3):
    for case in aot.cases(plan, torch.bfloat16):
        for capability in aot.CAPABILITIES:
            made = aot.compile_case(case, capability)
            print(made.name, plan.format.name, capability, made.registers, made.spill_bytes)
            if made.name == "static_store_kernel":
                print(made.ptx)
            if made.name == "static_decode_kernel":
                # Elements by 16 bytes, codes by 8, and none by itself.
                size = 16 if plan.format.name == "none" else 8
                assert f"], 0x{size:x}, " in made.ptx
"""


def test_kernels_over_static_blocks_compile() -> None:
    made = run("-c", STATIC_SCRIPT)
    assert made.returncode == 0, made.stderr
    taken = re.findall(r"^(\w+_kernel) (\w+) (\d+) (\d+) (\d+)$", made.stdout, re.MULTILINE)
    kinds = ("store", "decode", "combine", "context")
    assert {row[:3] for row in taken} == {
        (f"static_{kind}_kernel", quant, capability)
        for kind in kinds
        for quant in ("none", "fp8")
        for capability in ("80", "90")
    }
    for name, _, _, registers, spill_bytes in taken:
        assert 0 < int(registers) < 255, name
        assert int(spill_bytes) == 0, name
    assert "div.rn.f32" in made.stdout
    for inexact in (".ftz", "fma.rn.f32", ".approx", "div.full"):
        assert inexact not in made.stdout, inexact


@pytest.mark.slow
def test_every_kernel_fits_the_registers_of_both_gpus() -> None:
    printed = run("-m", "csrc_triton.aot", timeout=1200)
    assert printed.returncode == 0, printed.stderr
    sys.stdout.write(printed.stdout)
    heading, *lines = (line.split() for line in printed.stdout.splitlines())
    rows = [dict(zip(heading, line, strict=True)) for line in lines]
    assert {row["gpu"] for row in rows} == {"sm_80", "sm_90"}
    assert {row["format"] for row in rows} == set(FORMATS)
    attention = [row for row in rows if row["kernel"] == "_attend"]
    # Decode, context over dense blocks, context behind thin ones; five formats; two GPUs.
    assert len(attention) == 3 * 5 * 2
    assert [row for row in rows if int(row["spills"])] == []


def test_wide_heads_fit_the_shared_memory_of_small_gpus() -> None:
    options = (
        "--module",
        "decode",
        "context",
        "--head-size",
        "256",
        "--format",
        "none",
        "fp8",
        "kivi4",
    )
    printed = run("-m", "csrc_triton.aot", *options, "--capability", "80")
    assert printed.returncode == 0, printed.stderr
    heading, *lines = (line.split() for line in printed.stdout.splitlines())
    taken = [int(line[heading.index("shared")]) for line in lines if line[0] == "_attend"]
    assert len(taken) == 9
    # Compute capability 8.6 and 8.9.
    assert max(taken) <= 99 * 1024


def test_attention_over_pruned_values_compiles() -> None:
    options = ("--module", "decode", "--format", "k4v2", "--capability", "80")
    printed = run("-m", "csrc_triton.aot", *options, "--value-ratio", "0.3")
    assert printed.returncode == 0, printed.stderr
    heading, *lines = (line.split() for line in printed.stdout.splitlines())
    spills = {line[0]: int(line[heading.index("spills")]) for line in lines}
    assert spills == {"_attend": 0, "_combine": 0}


def test_table() -> None:
    printed = run(
        "-m", "csrc_triton.aot", "--module", "store", "--format", "none", "--capability", "80"
    )
    assert printed.returncode == 0, printed.stderr
    heading, *lines = printed.stdout.splitlines()
    assert heading.split()[:3] == ["kernel", "format", "dtype"]
    assert [line.split()[:4] for line in lines] == [
        ["store_kernel", "none", "bfloat16", "sm_80"],
        ["clear_kernel", "none", "bfloat16", "sm_80"],
    ]


def test_compiling_rejects_to_interpret() -> None:
    rejected = run("-m", "csrc_triton.aot", "--module", "store", "--format", "none", interpret=True)
    assert rejected.returncode != 0
    assert "TRITON_INTERPRET is set; unset it" in rejected.stderr
