import numpy as np
import pytest
import torch

from csrc_triton import compact
from csrc_triton.compact import compact_spans, compact_workspace
from tests.kernels.helpers import FORMATS, KINDS, bits, make_channels, make_plan
from tests.support.tables import crossed
from tests.triton.reference import compact_spans_ref, make_layers, split_dense

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
#: An odd number of heads, and another layer between two blocks of this one.
HEADS, LAYERS = 3, 2


def make_cache(plan, dtype, num_requests, spans, kind="usual"):
    return make_layers(plan, dtype, HEADS, num_requests, spans, kind)


def int32(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def on_device(layers, device):
    """A copy with the same strides."""
    copy = layers.transpose(0, 1).contiguous().to(device, copy=True)
    return copy.transpose(0, 1)


def check(layers, block_table, plan, device, request=(0,), span=(0,)):
    """Compact the second layer and compare the whole cache: nothing else may change."""
    expected, channels = layers.clone(), make_channels(plan, HEADS, len(request))
    compact_spans_ref(expected[1], block_table, request, span, channels, plan)
    actual, table = on_device(layers, device), block_table.to(device)
    tasks = int32(request, device), int32(span, device)
    compact_spans(actual[1], table, *tasks, channels.to(device), plan)
    assert torch.equal(bits(actual), bits(expected))
    assert not torch.equal(bits(actual), bits(layers))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # infinities and NaN, in numpy
@crossed({"dtype, kind": KINDS, "thin": FORMATS})
def test_compact_spans_is_bit_exact(device, dtype, kind, thin):
    plan = make_plan(32, dtype, 16, **thin)
    check(*make_cache(plan, dtype, 2, 2, kind), plan, device, [0, 1], [1, 0])


@pytest.mark.parametrize(
    ("head_size", "block_size", "ratio", "value_ratio", "quant", "group", "dtype"),
    [
        (80, 48, 0.5, 0.0, "none", 32, BF16),  # neither a power of two
        (80, 48, 0.5, 0.3, "none", 32, BF16),
        (80, 48, 0.5, 0.0, "fp8", 32, FP16),
        (96, 32, 0.4, 0.0, "k4v2", 32, BF16),
        (96, 32, 0.0, 0.4, "k4v2", 32, BF16),
        (256, 16, 0.6, 0.0, "none", 32, BF16),  # the widest head
        # The last thin block holds fewer tokens than the others.
        (32, 48, 0.6, 0.0, "none", 32, BF16),
        (32, 48, 0.6, 0.0, "fp8", 32, BF16),
        (32, 32, 0.7, 0.0, "kivi4", 32, BF16),
        (128, 16, 0.5, 0.0, "kivi4", 64, FP32),
        (128, 16, 0.5, 0.0, "kivi2", 128, FP32),
        (128, 16, 0.5, 0.0, "k4v2", 128, FP32),
        (128, 16, 0.5, 0.3, "kivi2", 64, BF16),
    ],
)
def test_compact_spans_of_odd_sizes(
    device, head_size, block_size, ratio, value_ratio, quant, group, dtype
):
    plan = make_plan(head_size, dtype, block_size, ratio, quant, group, value_ratio)
    if head_size == 32:
        last = plan.span_tokens - (plan.thin_blocks - 1) * plan.thin_block_tokens
        assert 0 < last < plan.thin_block_tokens
    check(*make_cache(plan, dtype, 1, 1), plan, device)


def fixed_values(device, dtype, quant, numbers):
    """A span whose first values are the given numbers, in every row; the others are 0."""
    plan = make_plan(32, dtype, 16, 0.0, quant)
    layers, block_table = make_cache(plan, dtype, 1, 1)
    layers.zero_()
    for layer in layers:
        split_dense(layer)[1][..., : len(numbers)] = torch.tensor(numbers)
    check(layers, block_table, plan, device)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "numbers",
    [
        [448.0, 2.0**-10, 3 * 2.0**-10, 5 * 2.0**-10, -(2.0**-10), 2.0**-6, 7.5 * 2.0**-9],  # ties
        [448.0, 17.0, 19.0, -17.0, 0.0, -0.0, 447.0, 433.0],
        [1e-40, -3e-39, 0.0],  # subnormal: the matrix becomes zero
        [3.4e38, -3.4e38, 1.0],
    ],
)
@pytest.mark.parametrize("quant", ["fp8", "kivi4"])
def test_compact_spans_rounds_as_the_reference(device, quant, numbers):
    fixed_values(device, FP32, quant, numbers)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("number", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("quant", ["fp8", "k4v2"])
def test_compact_spans_shows_a_broken_model(device, quant, number):
    fixed_values(device, BF16, quant, [1.0, number, 2.0])


def test_compact_spans_skips_what_is_not_due(device):
    plan = make_plan(32, BF16, 16, 0.5, "kivi4")
    layers, block_table = make_cache(plan, BF16, 3, 2)
    channels = make_channels(plan, HEADS, 5)
    request, span = [0, 2, 1, 0, 2], [1, -1, 0, -2, -1]
    table, expected = block_table.clone(), layers.clone()
    table[2] = 2**30  # whoever reads these blocks fails
    for task in (0, 2):
        compact_spans_ref(
            expected[1], block_table, request[task : task + 1], span[task : task + 1],
            channels[task : task + 1], plan,
        )  # fmt: skip
    actual = on_device(layers, device)
    tasks = int32(request, device), int32(span, device)
    compact_spans(actual[1], table.to(device), *tasks, channels.to(device), plan)
    assert torch.equal(bits(actual), bits(expected))


def test_compact_spans_shares_out_more_tasks_than_programs(device, monkeypatch):
    monkeypatch.setattr(compact, "TASKS", 4)  # several tiles of tasks
    plan = make_plan(32, BF16, 16, 0.5)
    layers, block_table = make_cache(plan, BF16, 3, 3)
    request, span = [0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 2, 1, -1, 0, 2, -1, 0]
    channels, expected = make_channels(plan, HEADS, 9), layers.clone()
    for task in range(9):
        if span[task] >= 0:
            compact_spans_ref(
                expected[1], block_table, request[task : task + 1], span[task : task + 1],
                channels[task : task + 1], plan,
            )  # fmt: skip
    actual = on_device(layers, device)
    workspace = compact_workspace(plan, device)[: 5 * plan.layout.run_bytes]  # 5 programs
    compact_spans(
        actual[1], block_table.to(device), int32(request, device), int32(span, device),
        channels.to(device), plan, workspace=workspace,
    )  # fmt: skip
    assert torch.equal(bits(actual), bits(expected))


@pytest.mark.parametrize(("quant", "ratio"), [("none", 0.5), ("fp8", 0.0)])
@pytest.mark.parametrize("value_ratio", [0.0, 0.5])
def test_compact_spans_of_all_layers(device, quant, ratio, value_ratio):
    # In one launch, with channels [L, 2, Hk, K].
    plan = make_plan(32, BF16, 16, ratio, quant, value_ratio=value_ratio)
    channels = make_channels(plan, HEADS, LAYERS, 2)
    layers, block_table = make_cache(plan, BF16, 2, 2)
    expected, actual = layers.clone(), on_device(layers, device)
    addresses = torch.tensor([layer.data_ptr() for layer in actual], device=device)
    given = channels.to(device) if plan.prunes else None
    tasks = int32([0, 1], device), int32([0, 1], device)
    compact_spans(actual[0], block_table.to(device), *tasks, given, plan, layers=addresses)
    for layer, tables in enumerate(channels):
        compact_spans_ref(expected[layer], block_table, [0, 1], [0, 1], tables, plan)
    assert torch.equal(bits(actual), bits(expected))


def test_compact_spans_without_tasks(device):
    plan = make_plan(64, BF16)
    layers, block_table = make_cache(plan, BF16, 1, 1)
    actual, none = on_device(layers, device), int32([], device)
    channels = torch.zeros(0, HEADS, plan.key_channels, dtype=torch.uint8, device=device)
    compact_spans(actual[1], block_table.to(device), none, none, channels, plan)
    assert torch.equal(bits(actual), bits(layers))


def test_compact_spans_rejects(device):
    plan = make_plan(64, BF16)
    layers, block_table = make_cache(plan, BF16, 1, 1)
    kv_cache, block_table = on_device(layers, device)[1], block_table.to(device)
    zero, channels = int32([0], device), make_channels(plan, HEADS, 1).to(device)

    def rejects(match, *arguments, **keywords):
        with pytest.raises(ValueError, match=match):
            compact_spans(kv_cache, block_table, *arguments, plan, **keywords)

    rejects(r"compact_spans: channels is torch\.uint8 .1, 3, 33.", zero, zero,
            torch.zeros(1, 3, 33, dtype=torch.uint8, device=device))  # fmt: skip
    rejects("compact_spans: channels is None; the plan keeps 32", zero, zero, None)
    rejects(r"compact_spans: span is torch\.int32 .2,.*expected .* .1,.", zero,
            int32([0, 1], device), channels)  # fmt: skip
    rejects(r"compact_spans: request is torch\.int64", zero.long(), zero, channels)
    rejects(r"layers is torch\.int32", zero, zero, channels, layers=zero)
    rejects("workspace is torch.uint8 .4.; expected uint8 of at least", zero, zero, channels,
            workspace=torch.zeros(4, dtype=torch.uint8, device=device))  # fmt: skip
