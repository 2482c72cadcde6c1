"""The rules of quantization: what they lose, and which bytes they touch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from think_vllm.kernels.reference.quantization import (
    code_and_back,
    dequantize,
    fp8_zeros,
    pack,
    quantize_fp8,
    quantize_integer,
    read_matrix,
    unpack,
    write_matrix,
)
from think_vllm.plan.formats import FORMATS, GROUP_SIZES, Encoding
from think_vllm.plan.layout import ThinLayout, max_key_channels
from think_vllm.plan.matrix_layout import MatrixLayout

INTEGER = [Encoding.INT4, Encoding.INT2]
#: Rounding to float16: half a unit in the last place, relative, and below 2 ** -14 absolute.
HALF, HALF_TINY = 2.0**-11, 2.0**-25
#: The arithmetic is float32; a few of its roundings lie between an element and its code.
FLOAT = 4 * 2.0**-24


def randn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


# --- codes and bytes


def test_pack_puts_the_first_code_into_the_lowest_bits() -> None:
    assert pack(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x0F]]
    codes = torch.tensor([[1, 2, 3, 0], [3, 3, 3, 3]], dtype=torch.uint8)
    assert pack(codes, 2).tolist() == [[0b00_11_10_01], [0xFF]]


def test_unpack_undoes_hand_made_bytes() -> None:
    packed = torch.tensor([[0x21, 0xF0]], dtype=torch.uint8)
    assert unpack(packed, 4, 4).tolist() == [[1, 2, 0, 15]]
    assert unpack(packed, 2, 8).tolist() == [[1, 0, 2, 0, 0, 0, 3, 3]]
    assert unpack(packed, 2, 5).tolist() == [[1, 0, 2, 0, 0]]


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("columns", [1, 3, 4, 7, 8, 92])
def test_unpack_undoes_pack(bits: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    codes = torch.randint(0, 2**bits, (5, columns), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (5, -(-columns * bits // 8))
    assert torch.equal(unpack(packed, bits, columns), codes)


def test_quantize_integer_of_a_hand_made_row() -> None:
    # Two groups: 0..3 and a constant; the last one is short.
    row = torch.tensor([[0.0, 1.0, 2.0, 3.0, 7.0, 7.0]])
    made = quantize_integer(row, bits=2, group=4)
    assert made.codes.tolist() == [[0, 1, 2, 3, 0, 0]]
    assert made.scales.tolist() == [[1.0], [0.0]]
    assert made.zeros is not None
    assert made.zeros.tolist() == [[0.0], [7.0]]
    assert dequantize(made, 4).tolist() == row.tolist()


def test_quantize_integer_rounds_ties_to_even() -> None:
    made = quantize_integer(torch.tensor([[0.0, 0.5, 1.5, 2.5, 15.0]]), bits=4, group=32)
    assert made.codes.tolist() == [[0, 0, 2, 2, 15]]


def test_quantize_fp8_of_a_hand_made_matrix() -> None:
    made = quantize_fp8(torch.tensor([[896.0, -2.0], [0.0, 34.0]]))
    assert made.scales.item() == 2.0
    # 448 = 1.75 * 2 ** 8; -1; 0; 17 is a tie between 16 and 18, and 16 is even
    assert made.codes.tolist() == [[0x7E, 0xB8], [0x00, 0x58]]
    assert dequantize(made, 32).tolist() == [[896.0, -2.0], [0.0, 32.0]]


# --- what is lost


def error_bound(matrix: torch.Tensor, encoding: Encoding, group: int) -> torch.Tensor:
    """What the docstrings allow, per element."""
    exact = matrix.double()
    if encoding is Encoding.FP8:
        scale = exact.abs().max() / 448
        nearest = torch.maximum(exact.abs() * 2**-4, scale * 2**-10)
        return nearest + exact.abs() * FLOAT + scale * 2**-10 * FLOAT
    levels = 2**encoding.value - 1
    bounds = []
    for part in exact.split(group, dim=1):
        low, high = part.amin(dim=1, keepdim=True), part.amax(dim=1, keepdim=True)
        span, largest = high - low, part.abs().amax(dim=1, keepdim=True)
        scale = span / levels * (1 + HALF) + HALF_TINY
        bound = scale / 2 + HALF * (largest + span) + HALF_TINY * (1 + levels)
        bounds.append((bound + FLOAT * (largest + span)).expand_as(part))
    return torch.cat(bounds, dim=1)


def check(
    matrix: torch.Tensor, encoding: Encoding, group: int, has_zero_points: bool = False
) -> None:
    error = (code_and_back(matrix, encoding, group, has_zero_points) - matrix.double()).abs()
    if has_zero_points:
        matrix = matrix.float() - fp8_zeros(matrix.float()).float()[:, None]
    assert bool((error <= error_bound(matrix, encoding, group)).all())


@pytest.mark.parametrize(
    ("encoding", "has_zero_points"),
    [(Encoding.FP8, False), (Encoding.FP8, True), (Encoding.INT4, False), (Encoding.INT2, False)],
)
@given(
    seed=st.integers(0, 2**31),
    exponent=st.integers(-30, 12),
    offset=st.floats(-100, 100, width=32),
    columns=st.integers(1, 150),
    group=st.sampled_from(GROUP_SIZES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=100)
def test_error_stays_within_the_stated_bound(
    encoding, has_zero_points, seed, exponent, offset, columns, group, dtype
):
    matrix = ((randn(6, columns, seed=seed) + offset) * 2.0**exponent).to(dtype)
    matrix = matrix.clamp(-60_000, 60_000)
    matrix[1] = matrix[1, 0]  # a constant row
    matrix[2] *= (torch.arange(columns) % 3 == 0).to(dtype)  # mostly zeros
    matrix[3, 0] *= 50  # an outlier
    check(matrix.clamp(-60_000, 60_000), encoding, group, has_zero_points)


@given(
    rows=st.lists(
        st.lists(st.floats(-60_000, 60_000, width=32), min_size=5, max_size=5),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=150)
def test_error_stays_within_the_bound_for_any_numbers(rows: list[list[float]]) -> None:
    for encoding in INTEGER:
        check(torch.tensor(rows), encoding, 3)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.25, 1024.0])
def test_constant_groups_come_back(value: float) -> None:
    matrix = torch.full((3, 40), value)
    for encoding in INTEGER:
        assert torch.equal(code_and_back(matrix, encoding, 32), matrix.double())
    # The scale is a quotient in float32.
    back = code_and_back(matrix, Encoding.FP8, 32)
    torch.testing.assert_close(back, matrix.double(), rtol=2**-24, atol=0)


@pytest.mark.parametrize("encoding", INTEGER)
def test_errors_are_even_over_the_range(encoding: Encoding) -> None:
    # Truncating instead of rounding, or 2 ** bits levels, would move the mean.
    matrix = torch.linspace(-1, 1, 4096)[None]
    error = code_and_back(matrix, encoding, 4096) - matrix.double()
    step = 2 / (2**encoding.value - 1)
    assert abs(float(error.mean())) < 0.01 * step
    assert float(error.abs().mean()) == pytest.approx(step / 4, rel=0.01)


@pytest.mark.parametrize("encoding", INTEGER)
def test_magnitudes_beyond_float16_saturate(encoding: Encoding) -> None:
    low, high = torch.full((1, 4), -1e6), torch.full((1, 4), 1e6)
    assert code_and_back(low, encoding, 4).tolist() == [[-65_504.0] * 4]
    assert code_and_back(high, encoding, 4).tolist() == [[65_504.0] * 4]


# --- what is not finite


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 37, 63])
@pytest.mark.parametrize("encoding", INTEGER)
def test_what_is_not_finite_makes_its_group_nan_and_no_other(encoding, place, poison):
    matrix = randn(4, 80)
    clean = code_and_back(matrix, encoding, 32)
    matrix[2, place] = poison
    back = code_and_back(matrix, encoding, 32)
    mine = torch.zeros(4, 80, dtype=torch.bool)
    first = place // 32 * 32
    mine[2, first : first + 32] = True
    assert bool(back[mine].isnan().all())
    assert torch.equal(back[~mine], clean[~mine])


@pytest.mark.parametrize("encoding", INTEGER)
def test_a_group_of_infinities_is_nan(encoding: Encoding) -> None:
    for values in ([math.inf] * 4, [-math.inf] * 4, [math.inf, -math.inf, 0.0, math.nan]):
        assert bool(code_and_back(torch.tensor([values]), encoding, 4).isnan().all())


@pytest.mark.parametrize("has_zero_points", [False, True])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_makes_an_fp8_matrix_nan(poison: float, has_zero_points: bool) -> None:
    matrix = randn(4, 80) + 100
    matrix[2, 5] = poison
    assert bool(code_and_back(matrix, Encoding.FP8, 32, has_zero_points).isnan().all())


# --- zeros of fp8 keys

#: What e4m3 loses of a standard normal number on average, and some more.
NORMAL_ERROR = 0.025


def biased_keys(tokens: int) -> torch.Tensor:
    """``[64, tokens]``: standard normal but for two channels, as Qwen2's key biases make them."""
    keys = randn(64, tokens)
    keys[31] += 400
    keys[63] -= 400
    return keys


def mean_error(keys: torch.Tensor) -> torch.Tensor:
    """Of each channel, [C]."""
    back = code_and_back(keys, Encoding.FP8, 32, has_zero_points=True)
    return (back - keys.double()).abs().mean(dim=1)


@pytest.mark.parametrize("tokens", [2, 8, 64, 88, 120])
def test_biased_channels_keep_what_tokens_differ_in(tokens: int) -> None:
    keys = biased_keys(tokens)
    assert float(mean_error(keys).max()) < 0.05
    # One scale alone, as values have it, loses it.
    plain = (code_and_back(keys, Encoding.FP8, 32) - keys.double()).abs().mean(dim=1)
    assert float(plain[[31, 63]].min()) > 1 or tokens == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_biased_channels_of_narrow_caches(dtype: torch.dtype) -> None:
    # Their own rounding near 400 is what tokens differ in, then; it has to come back.
    assert float(mean_error(biased_keys(88).to(dtype)).max()) < 0.05


@pytest.mark.parametrize("outlier", [-8000.0, 8000.0, 0.0])
def test_one_token_that_differs_spoils_no_other(outlier: float) -> None:
    keys = biased_keys(88)
    keys[:, 0] = outlier
    error = (code_and_back(keys, Encoding.FP8, 32, has_zero_points=True) - keys.double()).abs()
    assert float(error[:, 1:].mean(dim=1).max()) < 0.05
    assert float(error[:, 0].max()) <= abs(outlier) * 2**-4 + 40


@pytest.mark.parametrize("value", [1.0, -3.25, 400.0, 60_000.0, 2.0**-20])
@pytest.mark.parametrize("tokens", [1, 3, 88])
def test_constant_channels_come_back(value: float, tokens: int) -> None:
    keys = torch.full((3, tokens), value)
    keys[1] = -value
    assert torch.equal(fp8_zeros(keys), keys[:, 0].half())
    back = code_and_back(keys, Encoding.FP8, 32, has_zero_points=True)
    torch.testing.assert_close(back, keys.double(), rtol=2**-14, atol=0)


@pytest.mark.parametrize("value", [65_504.0, 70_000.0, 1e6, 3e38])
def test_zeros_beyond_float16_saturate(value: float) -> None:
    keys = value + randn(2, 64)
    keys[1] *= -1
    assert fp8_zeros(keys).abs().max() == 65_504.0
    assert fp8_zeros(keys)[1] == -fp8_zeros(keys)[0]
    back = code_and_back(keys, Encoding.FP8, 32, has_zero_points=True)
    torch.testing.assert_close(back, keys.double(), rtol=2**-4, atol=0)


def test_channels_without_an_offset_have_no_zero() -> None:
    # Symmetric ones, empty ones, those with one far token, and those below float16's numbers.
    keys = torch.zeros(4, 8)
    keys[0] = torch.tensor([1.0, -1.0] * 4)
    keys[2, 3] = 1000.0
    keys[3] = 1e-9
    assert fp8_zeros(keys).tolist() == [0.0] * 4


def test_zeros_do_not_depend_on_the_order_of_tokens() -> None:
    keys = (randn(16, 88) * torch.exp(4 * randn(16, 88, seed=1))) + 3
    for seed in range(5):
        order = torch.randperm(88, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(fp8_zeros(keys[:, order]), fp8_zeros(keys))


# --- runs


def layouts() -> list[ThinLayout]:
    """All formats, with and without table, with tokens that end a group and that do not."""
    made = []
    for format in FORMATS.values():
        for tokens, block, group in ((92, 48, 32), (64, 48, 64), (100, 64, 128)):
            most = max_key_channels(128, tokens, block, 2, format, group)
            for channels in {min(most, 61), most}:
                made.append(ThinLayout(128, channels, tokens, block, 2, format, group))
    return made


def touched(matrix: MatrixLayout, rows: int, columns: int) -> torch.Tensor:
    """Bytes that a matrix of ``rows`` by ``columns`` owns, counted one by one."""
    mine = []
    bits = matrix.encoding.element_bits(2)
    for row in range(rows):
        start = matrix.offset + row * matrix.row_bytes
        mine += range(start, start + -(-columns * bits // 8))
    if matrix.encoding is Encoding.FP8:
        mine += range(matrix.scales_offset, matrix.scales_offset + 4)
        if matrix.has_zero_points:
            mine += range(matrix.zero_points_offset, matrix.zero_points_offset + 2 * rows)
    if matrix.encoding.is_integer:
        for base in (matrix.scales_offset, matrix.zero_points_offset):
            for group in range(-(-columns // matrix.group)):
                start = base + 2 * group * matrix.rows
                mine += range(start, start + 2 * rows)
    return torch.tensor(mine)


@pytest.mark.parametrize("poison", [0xFF, 0x00])
@pytest.mark.parametrize("missing", [0, 4, 36], ids=["full", "short-by-4", "short-by-36"])
@pytest.mark.parametrize(
    "layout",
    layouts(),
    ids=lambda x: f"{x.format.name}-C{x.key_channels}-t{x.block_tokens}-g{x.group}",
)
def test_write_matrix_touches_its_own_bytes_only(layout, missing, poison):
    # 0xFF is NaN in every dtype involved, so reading what was not written would show.
    count = layout.block_tokens - missing
    keys = randn(layout.key_channels, count, seed=1).bfloat16()
    values = randn(count, layout.head_size, seed=2).bfloat16()
    run = torch.full((layout.run_bytes,), poison, dtype=torch.uint8)
    for matrix, part in ((keys, layout.keys), (values, layout.values)):
        before = run.clone()
        write_matrix(run, matrix, part)
        mine = touched(part, *matrix.shape)
        rest = torch.ones(layout.run_bytes, dtype=torch.bool)
        rest[mine] = False
        assert torch.equal(run[rest], before[rest])
        # Whoever reads sees what the encoding alone makes of the matrix.
        back = read_matrix(run, part, *matrix.shape, torch.bfloat16)
        quantized = code_and_back(matrix, part.encoding, part.group, part.has_zero_points)
        assert torch.equal(back, quantized)
        run[mine] = 255 - poison  # nothing that is read lies elsewhere
        assert not torch.equal(read_matrix(run, part, *matrix.shape, torch.bfloat16), back)
        write_matrix(run, matrix, part)


@pytest.mark.parametrize("name", FORMATS)
def test_write_matrix_reads_every_element(name: str) -> None:
    # Of a matrix with one element changed, no other group may change.
    layout = ThinLayout(64, 40, 44, 48, 2, FORMATS[name], 32)
    keys = randn(40, 44, seed=5).bfloat16()
    run = torch.zeros(layout.run_bytes, dtype=torch.uint8)
    write_matrix(run, keys, layout.keys)
    before = read_matrix(run, layout.keys, 40, 44, torch.bfloat16)
    keys[17, 35] = 9.0
    write_matrix(run, keys, layout.keys)
    after = read_matrix(run, layout.keys, 40, 44, torch.bfloat16)
    changed = before != after
    assert after[17, 35] == pytest.approx(9.0, rel=2**-4)
    if FORMATS[name].keys is not Encoding.FP8:
        changed[17, 32:] = False
        assert not bool(changed.any())
