"""Machine instructions of decode attention's loop over thin blocks, counted without a GPU.

Compiles the kernel ahead of time, disassembles it and prints, per format and GPU: warp
instructions per token and KV head by kind, bytes, widths of loads, what a program takes, how many
of them a multiprocessor holds, and which share of the bandwidth the instruction rate leaves.

Run: ``python -m bench.instructions [--out FILE.json]``. ``TRITON_INTERPRET`` must not
be set.
"""

import argparse
import json
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import triton

from bench.instruction_figures import Figures, assumptions, write_table
from bench.occupancy import MULTIPROCESSORS, occupancy
from bench.sass import (
    KINDS,
    Instruction,
    Loop,
    count_kinds,
    enclosing,
    find_loops,
    kind_of,
    load_bits,
    parse,
)
from bench.source_lines import Chain, number_lines
from csrc_triton import aot, decode
from think_vllm.plan.formats import FORMATS
from think_vllm.plan.planner import BlockPlan

#: Functions of the kernel over dense blocks have this in their names.
DENSE = "dense"
#: Functions that load codes or elements, and those that load what belongs to them.
CODE_LOADERS = re.compile(r"(load|read|fetch)_\w*(code|word|element|key|value)")
OTHER_LOADERS = re.compile(r"scale|half|halves|zero|table|page|query|queries")


def iterations_of_span(plan: BlockPlan, tokens: int) -> int:
    """Iterations of ``tokens`` each that cover a span, across its blocks; the last may overhang."""
    return -(-plan.span_tokens // tokens)


def thin_loops(code: Sequence[Instruction], chains: Sequence[Chain]) -> list[list[Loop]]:
    """Innermost loops over thin blocks with tensor instructions, each with the loops around it.

    The one with most instructions is first.

    Raises:
        ValueError: If there is none.
    """
    loops = find_loops(code)
    tensor = [loop for loop in loops if any(kind_of(code[i].opcode) == "tensor" for i in loop.body)]
    inner = [loop for loop in tensor if not any(other.body < loop.body for other in tensor)]
    thin = [loop for loop in inner if not _is_dense(code, chains, loop)]
    if not thin:
        raise ValueError(f"{len(loops)} loops, none over thin blocks with tensor instructions")
    thin.sort(key=lambda loop: len(loop.body), reverse=True)
    return [[loop, *enclosing(loop, loops)] for loop in thin]


def _is_dense(code: Sequence[Instruction], chains: Sequence[Chain], loop: Loop) -> bool:
    """Whether most of a loop that is known to come from a function comes from a dense one."""
    known = [chain for i in loop.body if (chain := _chain(code[i], chains))]
    dense = sum(any(DENSE in name for name in chain) for chain in known)
    return 2 * dense > len(known)


def _chain(instruction: Instruction, chains: Sequence[Chain]) -> Chain:
    number = instruction.line or 0
    return chains[number] if number < len(chains) else ()


def loads_code(chain: Chain) -> bool:
    """Whether a load that comes from there loads codes or elements, not what belongs to them."""
    return any(map(CODE_LOADERS.search, chain)) and not any(map(OTHER_LOADERS.search, chain))


def count(plan: BlockPlan, capability: int, dtype: torch.dtype) -> Figures:
    """Compile decode attention of a plan and count.

    Raises:
        RuntimeError: If ``TRITON_INTERPRET`` was set when Triton was imported.
        ValueError: If the loop or its loads of codes are not found.
    """
    case = decode.aot_cases(plan, dtype)[0]
    made = aot.compile_case(case, capability)
    ptx, chains = number_lines(made.ptx)
    _, cubin = aot.assemble(ptx, capability, made.fp_fusion)
    code = parse(aot.disassemble(cubin))
    (main, *around), *others = thin_loops(code, chains)
    tokens = decode.loop_tokens(plan)
    instructions = per_token(code, [main, *around], plan, tokens, made.warps)
    body = [code[i] for i in sorted(main.body)]
    loads = Counter(i.opcode for i in body if load_bits(i.opcode) is not None)
    wide = Counter(
        load_bits(i.opcode) or 0
        for i in body
        if i.base in ("LDG", "LDGSTS") and loads_code(_chain(i, chains))
    )
    if not wide:
        raise ValueError(
            f"no load in the loop comes from a function whose name fits {CODE_LOADERS.pattern!r}"
        )
    return Figures(
        format=plan.format.name,
        capability=capability,
        instructions=instructions,
        bytes=plan.key_bytes_per_token_head + plan.value_bytes_per_token_head,
        tokens=tokens,
        loads=dict(sorted(loads.items())),
        code_load_bits=dict(sorted(wide.items())),
        other_loops=[len(inner.body) for inner, *_ in others],
        registers=made.registers,
        spill_bytes=made.spill_bytes,
        shared_bytes=made.shared_bytes,
        warps=made.warps,
        occupancy=occupancy(
            MULTIPROCESSORS[capability], made.registers, made.shared_bytes, made.warps
        ),
    )


def per_token(
    code: Sequence[Instruction], nest: Sequence[Loop], plan: BlockPlan, tokens: int, warps: int
) -> dict[str, float]:
    """Warp instructions per token, by kind, over a whole span.

    Every instruction counts each time round, those that a predicate may switch off included.

    Args:
        code: The kernel.
        nest: The innermost loop and those around it, innermost first. The first one around it, if
            any, runs once for every span; what is around that one is not counted.
        plan: How blocks are laid out.
        tokens: Of an iteration of the innermost loop.
        warps: Of a program: each of them runs all of it.
    """
    inner = count_kinds(code[i] for i in nest[0].body)
    times = iterations_of_span(plan, tokens)
    outer = count_kinds(code[i] for i in nest[1].body - nest[0].body) if len(nest) > 1 else {}
    return {
        kind: warps * (times * inner[kind] + outer.get(kind, 0)) / plan.span_tokens
        for kind in KINDS
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    known = list(MULTIPROCESSORS)
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--capability", type=int, nargs="+", choices=known, default=known)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--head-size", type=int, default=aot.HEAD_SIZE)
    parser.add_argument("--ratio", type=float, default=0.5, help="share of key channels to prune")
    parser.add_argument("--out", type=Path, help="write JSON there, too")
    options = parser.parse_args(arguments)
    dtype = aot.DTYPES[options.dtype]
    plans = list(aot.make_plans(options.format, dtype, options.head_size, options.ratio))
    # What another checkout has compiled is the same code with that one's source lines.
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        found = [count(plan, gpu, dtype) for gpu in options.capability for plan in plans]
    print(f"Triton {triton.__version__}, {options.dtype}, head size {options.head_size}, "
          f"{options.ratio:g} of key channels pruned.\n")  # fmt: skip
    print(write_table(found) + "\n" + assumptions(options.capability), end="")
    if options.out is not None:
        options.out.write_text(json.dumps([figures.to_json() for figures in found], indent=2))


if __name__ == "__main__":
    main()
