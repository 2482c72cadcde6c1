"""Compile every kernel ahead of time, without a GPU, and say what it takes.

``python -m csrc_triton.aot`` prints a table: one line per kernel, format, dtype and GPU, with the
registers of a thread, the bytes that did not fit into them (spills) and the shared memory of a
program. ``TRITON_INTERPRET`` must not be set.

A module that has kernels lists the cases to compile in a function ``aot_cases(plan, dtype)`` and
is named in ``MODULES``, or in ``STATIC_MODULES`` if its plans are ``StaticPlan``s.
"""

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from think_vllm.plan.formats import FORMATS
from think_vllm.plan.planner import BlockPlan, plan_blocks
from think_vllm.plan.settings import ThinkConfig
from think_vllm.plan.static_plan import StaticPlan, plan_static

#: Modules of this package that have kernels.
MODULES = ("store", "scores", "compact", "decode", "context")
#: The same, of kernels over static blocks, and the formats that those have.
STATIC_MODULES = ("static_store", "static_decode", "static_context")
STATIC_FORMATS = ("none", "fp8")
#: Compute capabilities: A100 and H100.
CAPABILITIES = (80, 90)
#: Head size and dtype of what is compiled unless asked otherwise.
HEAD_SIZE = 128
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
THREADS_PER_WARP = 32


class AotCase(NamedTuple):
    """One way to compile a kernel."""

    kernel: Any  # the ``triton.jit`` function
    #: Type of each run-time argument, such as ``*u8`` or ``i32``; ``:16`` behind it promises a
    #: multiple of 16, as Triton finds out by itself when it launches. It counts for nothing where
    #: the kernel is declared not to need it (``launch.kernel``).
    signature: dict[str, str]
    constants: dict[str, Any]  # value of each ``tl.constexpr`` argument
    options: dict[str, Any]  # keywords of the launch, such as ``num_warps``


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes on a GPU."""

    name: str  # of the kernel
    capability: int  # compute capability, such as 90
    registers: int  # of a thread
    spill_bytes: int  # stores and loads of a thread, in its code, of what did not fit
    stack_bytes: int  # of a thread
    shared_bytes: int  # of a program
    warps: int  # of a program
    ptx: str  # the code before the assembler
    fp_fusion: bool  # whether the assembler may make one instruction of a product and a sum


def aot_case(
    kernel: Any, constants: dict[str, Any], options: dict[str, Any], **pointers: str
) -> AotCase:
    """Describe a kernel whose arguments are named as all of ours are.

    Args:
        kernel: As in ``AotCase``, as are ``constants`` and ``options``.
        constants: See there.
        options: See there.
        pointers: What ``<name>_ptr`` points to, by ``name``; int32 if it is not given. Of the other
            run-time arguments ``scale`` and ``cap`` are float32, the rest int32.
    """
    signature = {}
    for name in kernel.arg_names:
        if name.endswith("_ptr"):
            signature[name] = f"*{pointers.get(name.removesuffix('_ptr'), 'i32')}:16"
        elif name not in constants:
            signature[name] = "fp32" if name in ("scale", "cap") else "i32"
    return AotCase(kernel, signature, constants, options)


def cases(
    plan: BlockPlan | StaticPlan, dtype: torch.dtype, modules: Sequence[str] | None = None
) -> list[AotCase]:
    """Everything that the given modules want compiled for a plan and a cache dtype.

    Modules of another kind of plan are left out. None takes all of them.
    """
    found: list[AotCase] = []
    mine = STATIC_MODULES if isinstance(plan, StaticPlan) else MODULES
    for name in mine if modules is None else [name for name in modules if name in mine]:
        found += importlib.import_module(f"csrc_triton.{name}").aot_cases(plan, dtype)
    return found


def compile_case(case: AotCase, capability: int) -> Compiled:
    """Compile for a compute capability.

    Raises:
        RuntimeError: If ``TRITON_INTERPRET`` was set when Triton was imported.
    """
    if not isinstance(case.kernel, triton.JITFunction):
        raise RuntimeError("csrc_triton.aot: TRITON_INTERPRET is set; unset it to compile kernels")
    types = {name: kind.partition(":") for name, kind in case.signature.items()}
    names = case.kernel.arg_names
    source = ASTSource(
        fn=case.kernel,
        signature={name: types[name][0] if name in types else "constexpr" for name in names},
        constexprs=case.constants,
        attrs={
            (names.index(name),): [["tt.divisibility", int(multiple)]]
            for name, (_, _, multiple) in types.items()
            # Launches promise nothing of these, so what is compiled here must not rely on it.
            if multiple and name not in case.kernel.do_not_specialize_on_alignment
        },
    )
    target = GPUTarget("cuda", capability, THREADS_PER_WARP)
    made = triton.compile(source, target=target, options=dict(case.options))
    ptx = made.asm["ptx"]
    log, _ = assemble(ptx, capability, made.metadata.enable_fp_fusion)
    return Compiled(
        name=case.kernel.__name__,
        capability=capability,
        registers=_number(r"Used (\d+) registers", log),
        spill_bytes=_number(r"(\d+) bytes spill stores", log)
        + _number(r"(\d+) bytes spill loads", log),
        stack_bytes=_number(r"(\d+) bytes stack frame", log),
        shared_bytes=made.metadata.shared,
        warps=made.metadata.num_warps,
        ptx=ptx,
        fp_fusion=made.metadata.enable_fp_fusion,
    )


def assemble(ptx: str, capability: int, fp_fusion: bool) -> tuple[str, bytes]:
    """Assemble PTX as Triton does. Triton keeps the result only where a GPU can load it.

    Args:
        ptx: The code.
        capability: Compute capability, such as 90.
        fp_fusion: As in ``Compiled``.

    Returns:
        What the assembler says, and its output: an ELF file with source lines.
    """
    # As in Triton's backend: only these architectures have their own instructions.
    gpu = f"sm_{capability}{'a' if capability >= 90 else ''}"
    command = [triton.knobs.nvidia.ptxas.path, "-v", "-lineinfo", "--regAllocOptLevel=2"]
    command += [f"--gpu-name={gpu}", *([] if fp_fusion else ["--fmad=false"])]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        cubin = source.with_suffix(".cubin")
        command += [str(source), "-o", str(cubin)]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        return log, cubin.read_bytes()


def disassemble(cubin: bytes) -> str:
    """Machine code of an ELF file as text, with source lines."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.cubin"
        source.write_bytes(cubin)
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", "-g", str(source)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _number(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    if found is None:
        raise RuntimeError(f"csrc_triton.aot: no {pattern!r} in the assembler's output:\n{log}")
    return int(found.group(1))


def make_plans(
    formats: Sequence[str],
    dtype: torch.dtype,
    head_size: int,
    ratio: float,
    value_ratio: float = 0.0,
    static: bool = False,
) -> Iterator[Any]:
    """A ``BlockPlan``, or a ``StaticPlan``, for every format that has one."""
    for name in formats:
        config = ThinkConfig.model_validate(
            {"kv_channel_prune": ratio, "kv_value_prune": value_ratio, "kv_quant": name}
        )
        # A static plan's channels are of no interest here, so there is no file of them.
        plan = (plan_static if static else plan_blocks)(config, head_size, dtype.itemsize)
        if plan is not None:
            yield plan


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile and print a table."""
    every = [*MODULES, *STATIC_MODULES]
    parser = argparse.ArgumentParser(description="Compile every kernel ahead of time.")
    parser.add_argument("--capability", type=int, nargs="+", default=list(CAPABILITIES))
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--module", nargs="+", choices=every, default=every)
    parser.add_argument("--head-size", type=int, default=HEAD_SIZE)
    parser.add_argument("--ratio", type=float, default=0.5, help="share of key channels to prune")
    parser.add_argument("--value-ratio", type=float, default=0.0, help="the same of values")
    chosen = parser.parse_args(arguments)
    line = "{:<24}{:<8}{:<10}{:>6}{:>7}{:>11}{:>8}{:>8}{:>9}\n"
    write = sys.stdout.write
    write(line.format(
        "kernel", "format", "dtype", "gpu", "warps", "registers", "spills", "stack", "shared"
    ))  # fmt: skip
    for dtype_name in chosen.dtype:
        dtype, seen = DTYPES[dtype_name], set()
        wanted = (chosen.format, dtype, chosen.head_size, chosen.ratio, chosen.value_ratio)
        static = [name for name in chosen.format if name in STATIC_FORMATS]
        for plan in (*make_plans(*wanted), *make_plans(static, *wanted[1:], static=True)):
            for case in cases(plan, dtype, chosen.module):
                key = (case.kernel.__name__, repr(case[1:]))
                for capability in chosen.capability if key not in seen else ():
                    made = compile_case(case, capability)
                    write(line.format(
                        made.name, plan.format.name, dtype_name, f"sm_{capability}", made.warps,
                        made.registers, made.spill_bytes, made.stack_bytes, made.shared_bytes,
                    ))  # fmt: skip
                    sys.stdout.flush()
                seen.add(key)


if __name__ == "__main__":
    main()
