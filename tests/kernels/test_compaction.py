import numpy as np
import pytest
import torch

from tests.kernels.helpers import FORMATS, KINDS, bits, make_channels, make_layers, make_plan
from tests.support.tables import crossed
from think_vllm.kernels.cpu.compaction import compact_spans
from think_vllm.kernels.reference.compaction import compact_spans_ref, read_channels_ref


def check(plan, dtype, kind="bits", request=(0, 1, 1), span=(1, 0, 1), heads=2):
    """Compact in one of two layers and compare all bytes: nothing else may change."""
    layers, table = make_layers(plan, dtype, heads, max(request) + 1, max(span) + 1, kind)
    tasks = np.array(request, np.int32), np.array(span, np.int32)
    channels, expected = make_channels(plan, heads, len(request)), layers.clone()
    compact_spans_ref(expected[0], table, *tasks, channels, plan)
    compact_spans(layers[0], table, *tasks, channels, plan)
    assert torch.equal(bits(layers), bits(expected))
    assert torch.equal(read_channels_ref(layers[0], table, *tasks, plan), channels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("head_size", "block_size", "ratio"),
    [(64, 16, 0.5), (80, None, 0.5), (128, 48, 0.5), (128, 128, 0.5), (256, 32, 0.4),
     (128, None, 0.6)],
)  # fmt: skip
def test_compact_spans_is_bit_exact(dtype, head_size, block_size, ratio):
    check(make_plan(head_size, dtype, block_size, ratio), dtype)


@crossed({"dtype, kind": KINDS, "head_size": [64, 128], "thin": FORMATS})
def test_compact_spans_codes_to_the_bit(dtype, thin, head_size, kind):
    check(make_plan(head_size, dtype, None, **thin), dtype, kind)


@pytest.mark.parametrize("quant", ["kivi4", "k4v2", "kivi2"])
@pytest.mark.parametrize("group", [64, 128])
def test_compact_spans_quant_group(quant, group):
    check(make_plan(128, torch.float32, None, 0.5, quant, group), torch.float32, "usual")


def test_compact_spans_large_enough_for_threads():
    request, span = np.repeat(np.arange(3), 6), np.tile(np.arange(6), 3)
    plan = make_plan(128, torch.bfloat16, block_size=None)
    check(plan, torch.bfloat16, request=request, span=span, heads=4)


def test_compact_spans_without_tasks():
    plan = make_plan(64, torch.bfloat16)
    layers, block_table = make_layers(plan, torch.bfloat16, 2, 1, 1)
    before, none = bits(layers).clone(), np.zeros(0, np.int32)
    channels = torch.zeros(0, 2, plan.key_channels, dtype=torch.uint8)
    compact_spans(layers[0], block_table, none, none, channels, plan)
    assert torch.equal(bits(layers), before)


@pytest.mark.parametrize(
    ("more_channels", "spans", "message"), [(1, 1, "channels is"), (0, 2, "request has shape")]
)
def test_compact_spans_rejects(more_channels, spans, message):
    plan = make_plan(64, torch.bfloat16)
    layers, block_table = make_layers(plan, torch.bfloat16, 2, 1, 1)
    channels = torch.zeros(1, 2, plan.key_channels + more_channels, dtype=torch.uint8)
    tasks = np.zeros(1, np.int32), np.zeros(spans, np.int32)
    with pytest.raises(ValueError, match=f"compact_spans: {message}"):
        compact_spans(layers[0], block_table, *tasks, channels, plan)
