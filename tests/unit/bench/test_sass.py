"""Disassembly as text: instructions, loops, kinds, widths."""

import pytest

from bench.sass import count_kinds, enclosing, find_loops, kind_of, load_bits, parse

#: A loop in a loop, behind a branch around both, as nvdisasm prints them.
NESTED = """
.text._attend:
	//## File "/somewhere/decode.py", line 7
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_0:
	//## File "/somewhere/decode.py", line 9
        /*0020*/                   LDG.E R2, desc[UR8][R2.64] ;
.L_x_1:
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0040*/              @!PT LDS RZ, [RZ] ;
	//## File "/somewhere/tiles.py", line 3 inlined at "/somewhere/decode.py", line 9
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0070*/              @!P2 BRA `(.L_x_0) ;
.L_x_2:
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   BRA `(.L_x_3);
.L_x_4:
"""


def test_instructions() -> None:
    code = parse(NESTED)
    assert len(code) == 10
    assert [instruction.line for instruction in code] == [7, 7, 9, 9, 9, 3, 3, 3, 3, 3]
    assert (code[1].predicate, code[1].opcode, code[1].target) == ("!P0", "BRA", 8)
    assert code[2].operands == "R2, desc[UR8][R2.64]"
    assert (code[3].base, code[3].address) == ("HMMA", 0x30)
    assert [i.falls_through for i in code[7:]] == [True, False, False]


def test_nested_loops() -> None:
    outer, inner = find_loops(parse(NESTED))
    assert outer.body == frozenset(range(2, 8))
    assert (inner.header, inner.body) == (3, frozenset({3, 4, 5}))
    assert enclosing(inner, [outer, inner]) == [outer]
    assert enclosing(outer, [outer, inner]) == []


@pytest.mark.parametrize(
    "branch",
    [
        *("@P0 BRA `(.L_x_0)", "@!P0 BRA `(.L_1)", "@P0 BRA .L_x_0", "@!UP0 BRA.U `(.L_x_0)"),
        *("BRA.U UP0, `(.L_x_0)", "BRA.U.ANY !UP0, `(.L_x_0)", "BRA P0, `(.L_x_0)"),
        *("BRA.DIV UR4, `(.L_x_0)", "@P0 BRA 0x10", "@P0 JMP 0x10"),
    ],
)
def test_branches_of_all_assemblers(branch: str) -> None:
    code = parse(
        f"/*0000*/ MOV R1, R2 ;  /* 0x00000a00ff017624 */\n.L_x_0:\n.L_1:\n"
        f"/*0010*/ FADD R1, R1, R2 ;\n/*0020*/ {branch} ;\n/*0030*/ EXIT ;\n"
    )
    (loop,) = find_loops(code)
    assert loop.body == frozenset({1, 2})
    assert code[2].falls_through


def test_code_behind_the_end_that_jumps_back_is_part_of_its_loop_only() -> None:
    code = parse("""
        .L_x_0:
        /*0000*/ FADD R1, R1, R2 ;
        /*0010*/ @P0 BRA `(.L_x_2) ;
        .L_x_1:
        /*0020*/ FMUL R1, R1, R2 ;
        /*0030*/ @P1 BRA `(.L_x_0) ;
        /*0040*/ EXIT ;
        .L_x_2:
        /*0050*/ MUFU.EX2 R1, R1 ;
        /*0060*/ BRA `(.L_x_1) ;
    """)
    (loop,) = find_loops(code)
    assert loop.body == frozenset({0, 1, 2, 3, 5, 6})


def test_two_ways_back_are_one_loop() -> None:
    code = parse("""
        /*0000*/ MOV R1, R2 ;
        .L_x_0:
        /*0010*/ FADD R1, R1, R2 ;
        /*0020*/ @P0 BRA `(.L_x_0) ;
        /*0030*/ FMUL R1, R1, R2 ;
        /*0040*/ @P1 BRA `(.L_x_0) ;
        /*0050*/ EXIT ;
    """)
    (loop,) = find_loops(code)
    assert loop.body == frozenset({1, 2, 3, 4})


def test_predicated_exit_goes_on() -> None:
    code = parse("""
        .L_x_0:
        /*0000*/ @P0 EXIT ;
        /*0010*/ BRA `(.L_x_0) ;
    """)
    assert [loop.body for loop in find_loops(code)] == [frozenset({0, 1})]


def test_what_cannot_be_read() -> None:
    with pytest.raises(ValueError, match="no instruction"):
        parse("nvdisasm fatal : no such file")
    with pytest.raises(ValueError, match="a place that is not there"):
        parse("/*0000*/ BRA `(.L_x_9) ;")
    with pytest.raises(ValueError, match="without a target"):
        parse("/*0000*/ BRA R4 ;")


@pytest.mark.parametrize(
    ("kind", "opcodes"),
    [
        ("tensor", "HMMA.16816.F32.BF16 HGMMA.64x16x16.F32"),
        ("float", "FFMA.FTZ HFMA2.BF16_V2 HADD2 FSETP.GT.AND FMNMX MUFU.EX2"),
        ("conversion", "HADD2.F32 F2FP.BF16.F32.PACK_AB I2FP.F32.S32"),
        ("integer", "PRMT LOP3.LUT UIADD3.X USHF.R.S32.HI IMAD.WIDE VIADDMNMX MOV S2UR"),
        ("shared memory", "LDS.128 LDSM.16.MT88.4"),
        ("global memory", "LDGSTS.E.BYPASS.128 LDG.E.U8 UTMALDG.2D STG"),
        ("barrier", "BAR.SYNC.DEFER_BLOCKING LDGDEPBAR"),
        ("shuffle", "SHFL.BFLY"),
        ("other", "BRA ULDC.64 NOP"),
    ],
)
def test_kinds(kind: str, opcodes: str) -> None:
    names = opcodes.split()
    assert {name: kind_of(name) for name in names} == dict.fromkeys(names, kind)


def test_counts_have_every_kind() -> None:
    counts = count_kinds(parse(NESTED))
    assert (counts["tensor"], counts["other"], counts["shuffle"]) == (1, 5, 0)
    assert sum(counts.values()) == 10


@pytest.mark.parametrize(
    ("bits", "opcodes"),
    [
        (8, "LDG.E.U8"),
        (16, "LDG.E.S16.CONSTANT"),
        (32, "LDG.E LDGSTS.E LDSM.16.M88"),
        (64, "LDG.E.EF.LTC128B.64 LDS.U.64"),
        (128, "LDG.E.128 LDGSTS.E.BYPASS.LTC128B.128 LDSM.16.MT88.4"),
        (None, "STS.128 LDGDEPBAR IMAD"),
    ],
)
def test_bits_of_loads(bits: int | None, opcodes: str) -> None:
    assert {load_bits(opcode) for opcode in opcodes.split()} == {bits}
