"""The byte layout, against bytes counted by hand."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from think_vllm.errors import ThinkError
from think_vllm.plan.formats import FORMATS, GROUP_SIZES, Encoding
from think_vllm.plan.layout import BlockForm, DenseLayout, ThinLayout, max_key_channels
from think_vllm.plan.matrix_layout import ALIGN_BYTES, MatrixLayout
from think_vllm.plan.static_layout import StaticLayout

FP8, KIVI4, K4V2, KIVI2 = (FORMATS[name] for name in ("fp8", "kivi4", "k4v2", "kivi2"))


@pytest.mark.parametrize(
    ("layout", "run", "values", "table", "used"),
    [
        # head, channels, thin tokens, block, itemsize: the worked example of layout.py
        (ThinLayout(128, 63, 64, 48, 2), 24_576, 8_064, 24_448, 24_511),
        (ThinLayout(128, 76, 80, 64, 2), 32_768, 12_160, 32_640, 32_716),
        # 75 * 40 * 2 = 6,000 is a multiple of 16
        (ThinLayout(128, 75, 40, 32, 2), 16_384, 6_000, 16_240, 16_315),
        # 31 * 20 * 2 = 1,240 is padded to 1,248
        (ThinLayout(64, 31, 20, 16, 2), 4_096, 1_248, 3_808, 3_839),
        (ThinLayout(128, 63, 64, 48, 4), 49_152, 16_128, 48_896, 48_959),
    ],
    ids=["bf16-n48", "bf16-n64", "bf16-n32", "bf16-padded", "fp32-n48"],
)
def test_plain_thin_layout_has_the_bytes_counted_by_hand(layout, run, values, table, used):
    counted = (layout.run_bytes, layout.values.offset, layout.table_offset, layout.used_bytes)
    assert counted == (run, values, table, used)


@pytest.mark.parametrize(
    ("arguments", "keys", "values", "used"),
    [
        # fp8: codes (of keys at 0), scale, zeros of keys, end. The worked example of layout.py:
        # 62 * 128 = 7,936; 62 * 2 = 124; 128 * 128 = 16,384; table 62
        ((128, 62, 128, 48, 2, FP8), (7_936, 7_952, 8_076), (8_080, 24_464, 24_468), 24_530),
        # 128 * 60 = 7,680 each, no table
        ((128, 128, 60, 32, 2, FP8), (7_680, 7_696, 7_952), (7_952, 15_632, 15_636), 15_636),
        # Two rows make a unit: 32 * 20; a code is one byte in a cache of fp32 too
        ((64, 31, 20, 16, 4, FP8), (640, 656, 718), (720, 2_000, 2_004), 2_035),
        # Integers: codes, scales, zeros, end.
        # Keys 74 rows of 32 B, 2 groups: 296 B of scales, padded; values 64 rows of 64 B, 4 groups
        ((128, 74, 64, 16, 2, KIVI4), (2_368, 2_672, 2_968), (2_976, 7_072, 7_584, 8_096), 8_170),
        # The worked example of layout.py: 88 tokens are 2.75 groups of 32
        ((128, 64, 88, 16, 2, K4V2), (2_816, 3_200, 3_584), (3_584, 6_400, 7_104, 7_808), 7_872),
        # 62 rows of 28 B = 1,736 are padded; 112 tokens are 3.5 groups of 32
        ((128, 62, 112, 16, 2, KIVI2), (1_744, 2_240, 2_736), (2_736, 6_320, 7_216, 8_112), 8_174),
        # One group of 112 tokens, none of 128; no table
        (
            (128, 128, 112, 16, 2, KIVI2, 128),
            (3_584, 3_840, 4_096),
            (4_096, 7_680, 7_904, 8_128),
            8_128,
        ),
        # The cache's own dtype plays no part: keys 64 rows of 13 units of 8 tokens, 52 B for the 50
        # that they need; values 100 rows of 32 B
        (
            (64, 64, 100, 16, 4, KIVI4, 64),
            (3_328, 3_584, 3_840),
            (3_840, 7_040, 7_248, 7_448),
            7_448,
        ),
    ],
    ids=["fp8", "fp8-all", "fp8-padded", "kivi4", "k4v2", "kivi2", "kivi2-g128", "fp32-kivi4-g64"],
)
def test_coded_thin_layout_has_the_bytes_counted_by_hand(arguments, keys, values, used):
    layout = ThinLayout(*arguments)

    def offsets(matrix: MatrixLayout) -> tuple[int, ...]:
        has_zero_points = matrix.encoding.is_integer or matrix.has_zero_points
        zeros = (matrix.zero_points_offset,) if has_zero_points else ()
        return matrix.offset, matrix.scales_offset, *zeros, matrix.end

    assert (offsets(layout.keys), offsets(layout.values)) == ((0, *keys), values)
    assert (layout.table_offset, layout.used_bytes) == (values[-1], used)


@pytest.mark.parametrize(
    ("format", "keys", "values"),
    [
        # 64 channels of 92 tokens, and 92 tokens of 128 channels, in a cache of 2-byte elements
        ("none", 64 * 92 * 2, 92 * 128 * 2),
        # Zeros of 2 bytes for every channel of keys
        ("fp8", 64 * 92 + 4 + 64 * 2, 92 * 128 + 4),
        # A scale and a zero of 2 bytes for every group of 32
        ("kivi4", 64 * (46 + 3 * 4), 92 * (64 + 4 * 4)),
        ("k4v2", 64 * (46 + 3 * 4), 92 * (32 + 4 * 4)),
        ("kivi2", 64 * (23 + 3 * 4), 92 * (32 + 4 * 4)),
    ],
)
def test_content_bytes_leave_padding_out(format: str, keys: int, values: int) -> None:
    layout = ThinLayout(128, 64, 92, 80, 2, FORMATS[format], 32)
    assert (layout.keys.content_bytes, layout.values.content_bytes) == (keys, values)


@pytest.mark.parametrize(
    ("layout", "values", "value_table", "used"),
    [
        # values: offset and end; where the table of values starts; that of keys is at the end.
        # The worked example of layout.py: values 64 * 64 * 2 = 8,192
        (ThinLayout(128, 63, 64, 32, 2, value_channels=64), (8_064, 16_256), 16_319, 16_383),
        # All key channels: 128 * 56 * 2 = 14,336, then 56 * 88 * 2 = 9,856, and one table
        (ThinLayout(128, 128, 56, 48, 2, value_channels=88), (14_336, 24_192), 24_192, 24_280),
        # fp8: 62 * 112 = 6,944; values 112 * 44 = 4,928 behind a scale and 61 zeros
        (ThinLayout(64, 61, 112, 96, 2, FP8, value_channels=44), (7_088, 12_020), 12_081, 12_125),
        # Values 224 rows of 6 units of 16 channels, 24 B for the 22 that 88 need, and 3 groups, the
        # last one of 24 channels
        (ThinLayout(128, 50, 224, 32, 2, K4V2, 32, 88), (7_008, 15_072), 15_122, 15_210),
        # A vector of 16 columns of the last row ends 24 B behind its 4 values, table or not
        (ThinLayout(16, 16, 17, 16, 2, value_channels=4), (544, 680), 680, 704),
    ],
    ids=["plain", "keys-whole", "fp8", "k4v2", "read-behind"],
)
def test_layout_with_pruned_values_has_the_bytes_counted_by_hand(layout, values, value_table, used):
    assert (layout.values.offset, layout.values.end) == values
    assert (layout.table_offset, layout.value_table_offset) == (values[1], value_table)
    assert layout.used_bytes == used
    assert layout.has_value_table


@pytest.mark.parametrize("format", FORMATS)
def test_keeping_all_values_is_the_layout_without_a_table(format: str) -> None:
    rest = (128, 64, 92, 80, 2, FORMATS[format], 32)
    layout, other = ThinLayout(*rest), ThinLayout(*rest, value_channels=128)
    assert (layout.values, layout.used_bytes) == (other.values, other.used_bytes)
    assert not other.has_value_table


def test_dense_layout_splits_a_run_in_half() -> None:
    layout = DenseLayout(head_size=128, block_size=48, itemsize=2)
    assert (layout.run_bytes, layout.values_offset) == (24_576, 12_288)
    assert (layout.key_strides, layout.value_strides) == ((1, 48), (128, 1))


def test_dense_layout_of_token_rows_has_a_key_and_a_value_in_each() -> None:
    layout = DenseLayout(128, 48, 2, BlockForm.GPU)
    assert (layout.run_bytes, layout.values_offset) == (24_576, 256)
    assert layout.key_strides == layout.value_strides == (256, 1)


def test_thin_layout_rejects_what_does_not_fit() -> None:
    with pytest.raises(ThinkError, match="take 24640 bytes, a block has 24576"):
        ThinLayout(128, 64, 64, 48, 2)
    with pytest.raises(ThinkError, match=r"69 of 128 key channels \(k4v2\) take 82\d\d bytes"):
        ThinLayout(128, 69, 88, 16, 2, FORMATS["k4v2"])
    with pytest.raises(ThinkError, match=r"64 of 128 key channels and 68 value channels \(none\)"):
        ThinLayout(128, 64, 64, 32, 2, value_channels=68)
    with pytest.raises(ThinkError, match="value_columns=129, head_size=128"):
        ThinLayout(128, 64, 64, 48, 2, value_channels=129)


FITTING = {
    "head_size": st.sampled_from([32, 64, 96, 128, 192, 256]),
    "block_size": st.sampled_from([16, 32, 48, 64, 96, 128]),
    "itemsize": st.sampled_from([2, 4]),
    "group": st.sampled_from(GROUP_SIZES),
    # Thin tokens in quarters of a block, up to as many as 2 bits of 4 bytes make possible
    "quarters": st.integers(5, 64),
}


@pytest.mark.parametrize("format", FORMATS)
@given(**FITTING)
@settings(max_examples=60)
def test_max_key_channels_is_the_largest_that_fits(
    format: str, head_size: int, block_size: int, itemsize: int, group: int, quarters: int
) -> None:
    tokens = block_size // 4 * quarters
    rest = (tokens, block_size, itemsize, FORMATS[format], group)
    channels = max_key_channels(head_size, *rest)
    if channels:
        assert ThinLayout(head_size, channels, *rest).key_channels == channels
    # All channels need no table, so they may fit where one channel fewer does not.
    for more in {channels + 1, head_size} if channels < head_size else ():
        with pytest.raises(ThinkError):
            ThinLayout(head_size, more, *rest)


def test_max_key_channels_keeps_all_where_only_the_table_would_not_fit() -> None:
    assert max_key_channels(128, 64, 16, 2, FORMATS["k4v2"]) == 128
    with pytest.raises(ThinkError):
        ThinLayout(128, 127, 64, 16, 2, FORMATS["k4v2"])


@pytest.mark.parametrize("format", FORMATS)
@given(**FITTING)
@settings(max_examples=60)
def test_parts_are_aligned_and_do_not_overlap(
    format: str, head_size: int, block_size: int, itemsize: int, group: int, quarters: int
) -> None:
    tokens = block_size // 4 * quarters
    rest = (tokens, block_size, itemsize, FORMATS[format], group)
    channels = max_key_channels(head_size, *rest)
    if not channels:
        return
    layout = ThinLayout(head_size, channels, *rest)
    parts = []
    for matrix in (layout.keys, layout.values):
        own = [(matrix.offset, matrix.rows * matrix.row_bytes)]
        if matrix.encoding.is_integer:
            factors = 2 * matrix.groups * matrix.rows
            own += [(matrix.scales_offset, factors), (matrix.zero_points_offset, factors)]
        elif matrix.encoding is Encoding.FP8:
            own += [(matrix.scales_offset, 4)]
            own += [(matrix.zero_points_offset, 2 * matrix.rows)] if matrix.has_zero_points else []
        assert all(start % ALIGN_BYTES == 0 for start, _ in own)
        assert matrix.content_bytes == sum(size for _, size in own)
        assert matrix.end == sum(own[-1])
        parts += own
    assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(parts))
    assert layout.table_offset == layout.values.end
    assert layout.used_bytes <= layout.run_bytes


@pytest.mark.parametrize(
    ("layout", "keys", "run"),
    [
        # kept key and value channels, block, itemsize: the worked example of layout.py
        (StaticLayout(64, 128, 128, 2), 32_768, 49_152),
        (StaticLayout(90, 96, 64, 4), 24_576, 47_616),
        (StaticLayout(13, 13, 16, 2), 416, 832),
        (StaticLayout(64, 128, 128, 2, is_quantized=True), 16_384, 25_600),
        (StaticLayout(13, 24, 16, 4, is_quantized=True), 384, 720),
    ],
)
def test_static_layout_has_the_bytes_counted_by_hand(layout, keys, run):
    assert (layout.keys_offset, layout.run_bytes) == (keys, run)
    assert layout.keys_offset % ALIGN_BYTES == 0 == layout.run_bytes % ALIGN_BYTES
