"""Triton's kernels on thin blocks that keep fewer value channels, against the references."""

import pytest
import torch

from csrc_triton.splits import make_workspace
from tests.kernels.helpers import make_plan
from tests.triton import test_compact, test_context, test_decode

#: 0.4 keeps 36 of 64 channels: no power of two, and groups that are not full.
PLANS = [
    (quant, *ratios)
    for quant in ("none", "fp8", "kivi4", "k4v2", "kivi2")
    for ratios in ((0.0, 0.4), (0.5, 0.5))
]
plans = pytest.mark.parametrize(("quant", "ratio", "value_ratio"), PLANS)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def pruned(head_size, dtype, quant, ratio, value_ratio, block_size=16, group=32):
    plan = make_plan(head_size, dtype, block_size, ratio, quant, group, value_ratio)
    assert plan.value_channels < head_size
    return plan


def make_channels(plan, *shape):
    channels = test_compact.make_channels(plan, *shape)
    if not plan.prunes_keys:
        channels[..., : plan.head_size] = torch.arange(plan.head_size)
    return channels


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # infinities and NaN, in numpy
@plans
@pytest.mark.parametrize(("dtype", "kind"), [(BF16, "usual"), (FP32, "bits")])
def test_compact_spans_is_bit_exact(device, dtype, kind, quant, ratio, value_ratio):
    plan = pruned(32, dtype, quant, ratio, value_ratio)
    layers, block_table = test_compact.make_cache(plan, dtype, 2, 2)
    if kind == "usual":  # else all magnitudes, NaN and infinities
        test_compact.make_usual(layers)
    channels = make_channels(plan, 2)
    test_compact.check(layers, block_table, [0, 1], [1, 0], channels, plan, device)


@pytest.mark.parametrize(
    ("head_size", "block_size", "ratio", "value_ratio", "quant", "group"),
    [
        (80, 48, 0.5, 0.3, "none", 32),
        (96, 32, 0.0, 0.4, "k4v2", 32),
        (128, 16, 0.5, 0.3, "kivi2", 64),
    ],
)
def test_compact_spans_of_odd_sizes(
    device, head_size, block_size, ratio, value_ratio, quant, group
):
    plan = pruned(head_size, BF16, quant, ratio, value_ratio, block_size, group)
    layers, block_table = test_compact.make_cache(plan, BF16, 1, 1)
    test_compact.make_usual(layers)
    test_compact.check(layers, block_table, [0], [0], make_channels(plan, 1), plan, device)


@pytest.mark.parametrize(("quant", "ratio"), [("none", 0.5), ("fp8", 0.0)])
def test_compact_spans_of_all_layers_inherits_tables(device, quant, ratio):
    plan = pruned(32, BF16, quant, ratio, 0.5)
    test_compact.check_inherited(plan, make_channels(plan, test_compact.LAYERS, 2), device)


@plans
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_decode_formats(quant, ratio, value_ratio, dtype):
    plan = pruned(64, dtype, quant, ratio, value_ratio)
    test_decode.check(test_decode.make_case(plan, dtype, 4, 2, test_decode.contexts_of(plan)))


@pytest.mark.parametrize(
    ("head_size", "quant", "group"),
    [(80, "none", 32), (96, "k4v2", 32), (128, "kivi4", 64), (128, "k4v2", 128), (256, "fp8", 32)],
)
def test_decode_of_odd_sizes(head_size, quant, group):
    plan = pruned(head_size, FP32, quant, 0.5, 0.3, 16, group)
    contexts = [(plan.span_tokens + 17, 1), (5, 0)]
    test_decode.check(test_decode.make_case(plan, FP32, 4, 2, contexts))


@pytest.mark.parametrize("splits", [2, 5, 16])
@pytest.mark.parametrize("quant", ["none", "k4v2"])
def test_decode_splits(quant, splits):
    # More splits than blocks leave empty ones; a split may start within a span.
    plan = pruned(64, FP32, quant, 0.5, 0.3)
    case = test_decode.make_case(plan, FP32, 4, 2, test_decode.contexts_of(plan))
    workspace = make_workspace(8, 4, 64, splits, test_decode.DEVICE).fill_(torch.nan)
    test_decode.check(case, workspace=workspace)


@pytest.mark.parametrize("quant", ["none", "fp8", "kivi4", "k4v2"])
def test_context_behind_thin_spans(quant):
    plan = pruned(64, FP32, quant, 0.5, 0.3)
    span = plan.span_tokens
    requests = [(9, span + 20, 1), (3, 40, 0), (4, 2 * span + 4, 2)]
    test_context.check(plan, FP32, (4, 2), requests)
