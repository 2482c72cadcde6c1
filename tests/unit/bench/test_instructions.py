"""Which loop is counted, and over how many tokens."""

from pathlib import Path

import pytest
import torch

from bench.instructions import iterations_of_span, loads_code, per_token, thin_loops
from bench.sass import parse
from bench.source_lines import function_at, number_lines
from csrc_triton import aot
from think_vllm.plan.planner import BlockPlan

#: Loops over thin blocks (line 1: in a loop over blocks; line 2) and over dense ones (line 3).
CHAINS = [
    (),
    ("dot", "attend_thin", "_attend"),
    ("attend_thin", "_attend"),
    ("dot", "attend_dense", "_attend"),
]
CODE = """
	//## File "decode.py", line 2
        .L_x_0:
        /*0000*/ MOV R1, R2 ;
	//## File "decode.py", line 1
        .L_x_1:
        /*0010*/ HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0020*/ FMUL R1, R1, R2 ;
        /*0030*/ @P0 BRA `(.L_x_1) ;
	//## File "decode.py", line 2
        /*0040*/ @P0 BRA `(.L_x_0) ;
        .L_x_2:
        /*0050*/ FADD R1, R1, R2 ;
        /*0060*/ @P0 BRA `(.L_x_2) ;
	//## File "decode.py", line 3
        .L_x_3:
        /*0070*/ HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0080*/ HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0090*/ FADD R1, R1, R2 ;
        /*00a0*/ FADD R1, R1, R2 ;
        /*00b0*/ @P0 BRA `(.L_x_3) ;
        /*00c0*/ EXIT ;
"""


def plan_of(quant: str) -> BlockPlan:
    return next(aot.make_plans([quant], torch.bfloat16, 128, 0.5))


def test_the_loop_over_thin_blocks() -> None:
    ((main, outer),) = thin_loops(parse(CODE), CHAINS)
    assert main.body == frozenset({1, 2, 3})
    assert outer.body == frozenset({0, 1, 2, 3, 4})


def test_no_loop_over_thin_blocks() -> None:
    dense = [CHAINS[3] for _ in CHAINS]
    with pytest.raises(ValueError, match="4 loops, none"):
        thin_loops(parse(CODE), dense)


def test_shares_of_the_inner_and_the_outer_loop() -> None:
    plan = plan_of("kivi4")
    nest = thin_loops(parse(CODE), CHAINS)[0]
    tokens = plan.thin_block_tokens // 2
    counts = per_token(parse(CODE), nest, plan, tokens, warps=4)
    times = iterations_of_span(plan, tokens)
    assert counts["tensor"] == pytest.approx(4 * times / plan.span_tokens)
    # A move and a branch once a span; a branch in every tile.
    assert counts["integer"] == pytest.approx(4 / plan.span_tokens)
    assert counts["other"] == pytest.approx(4 * (times + 1) / plan.span_tokens)


def test_a_tile_that_is_not_full_counts_whole() -> None:
    plan = plan_of("k4v2")
    assert iterations_of_span(plan, 1) == plan.span_tokens
    assert iterations_of_span(plan, plan.span_tokens) == 1
    assert iterations_of_span(plan, plan.span_tokens - 1) == 2
    # Tiles go on from block to block.
    assert iterations_of_span(plan, 2 * plan.thin_block_tokens) == -(-plan.thin_blocks // 2)


def test_loads_of_codes() -> None:
    assert loads_code(("load_codes", "load_values", "attend_thin"))
    assert loads_code(("load_words", "attend_thin"))
    assert not loads_code(("load_halves", "load_values", "attend_thin"))
    assert not loads_code(("attend_thin", "_attend"))
    assert not loads_code(())


def test_lines_are_numbered_by_chains_of_calls(tmp_path: Path) -> None:
    source = tmp_path / "tiles.py"
    source.write_text("def outer():\n    pass\n\n    def inner():\n        pass\n", "utf-8")
    ptx, chains = number_lines(
        f"\t.loc\t1 5 7  // tiles.py:5:7 @[ gone.py:2:4 @[ tiles.py:2:40 ] ]\n"
        f"\tadd.s32 %r1, %r2, %r3;\n"
        f"\t.loc\t1 2 0\n"
        f"\t.loc\t1 5 7  // tiles.py:5:7 @[ gone.py:2:4 @[ tiles.py:2:40 ] ]\n"
        f'\t.file\t1 "{source}"\n'
    )
    numbered = [row for row in ptx.splitlines() if ".loc" in row]
    assert numbered == [f"\t.loc 1 {number} 0" for number in (1, 2, 1)]
    assert "add.s32" in ptx
    assert chains == [(), ("inner", "", "outer"), ("outer",)]
    assert function_at(str(source), 99) == ""
