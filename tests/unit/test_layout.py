"""The byte layout, against bytes counted by hand."""

import pytest

from think_vllm.errors import ThinkError
from think_vllm.layout import DenseLayout, ThinLayout, max_key_channels


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
def test_thin_layout_has_the_bytes_counted_by_hand(
    layout: ThinLayout, run: int, values: int, table: int, used: int
) -> None:
    counted = (layout.run_bytes, layout.values_offset, layout.table_offset, layout.used_bytes)
    assert counted == (run, values, table, used)


def test_dense_layout_splits_a_run_in_half() -> None:
    layout = DenseLayout(head_size=128, block_size=48, itemsize=2)
    assert (layout.run_bytes, layout.values_offset) == (24_576, 12_288)


def test_thin_layout_refuses_what_does_not_fit() -> None:
    with pytest.raises(ThinkError, match="take 24640 bytes, a block has 24576"):
        ThinLayout(128, 64, 64, 48, 2)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 96, 128])
@pytest.mark.parametrize("head_size", [64, 80, 128, 192, 256])
def test_max_key_channels_is_the_largest_that_fits(
    head_size: int, block_size: int, itemsize: int
) -> None:
    for tokens in range(block_size + 4, 2 * block_size, 4):
        channels = max_key_channels(head_size, tokens, block_size, itemsize)
        if channels:
            ThinLayout(head_size, channels, tokens, block_size, itemsize)
        if channels < head_size:
            with pytest.raises(ThinkError):
                ThinLayout(head_size, channels + 1, tokens, block_size, itemsize)
