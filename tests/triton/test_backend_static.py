"""The CUDA backend of ``--kv-select static``: whole lives of requests, against the reference."""

import pytest
import torch
from vllm.v1.attention.backend import AttentionCGSupport

from tests.support.static_blocks import QUANTS, make_plan
from tests.triton.static_engine import StaticWorker
from think_vllm.errors import ThinkError
from think_vllm.worker.cuda.warmup import warm_up_static
from think_vllm.worker.static.cuda import StaticCUDABackend, StaticCUDAMetadataBuilder


@pytest.mark.parametrize(
    ("quant", "heads"), [("none", (4, 2)), ("fp8", (4, 2)), ("fp8", (2, 2))], ids=str
)
def test_lives_of_several_requests(device, quant, heads):
    worker = StaticWorker(make_plan(31, 48, torch.float32, quant=quant), heads, device)
    worker.add("long", 60)
    worker.add("short", 25)
    worker.add("one", 4)
    worker.step(long=16, short=7)  # whole blocks, and a part of one
    worker.step(long=17, short=1, one=1)  # a chunk, an answer, a prompt of one token
    worker.step(long=1, short=8, one=1)  # the last token of a prompt alone; a block is filled
    worker.step(long=1, short=1)
    # Both are preempted, then resumed: prompt and output in one chunk, or in several.
    worker.preempt("long")
    worker.preempt("short")
    worker.step(long=35, one=1)
    worker.step(long=1, short=9)
    worker.step(short=9, one=1, long=1)
    worker.step(short=1, long=1)


@pytest.mark.parametrize("quant", QUANTS)
def test_cached_prefixes_are_shared(device, quant):
    worker = StaticWorker(make_plan(32, 40, torch.float32, quant=quant), (4, 2), device)
    worker.add("first", 50)
    worker.step(first=40)
    worker.add("second", 50, like=("first", 32))
    worker.add("third", 33, like=("first", 32))
    # Its questions are its own, so whoever computed the prefix has no part in its answers.
    worker.step(first=1, second=9, third=1)
    worker.step(first=1, second=1)


def test_batches_of_single_tokens_run_as_graphs(device):
    worker = StaticWorker(make_plan(31, 48, torch.float32), (4, 2), device, graphs=True)
    worker.add("first", 40)
    worker.add("second", 40)
    worker.add("third", 40)
    worker.step(first=31, second=15, third=2)
    assert worker.graph_steps == 0
    for _ in range(2):  # into new blocks, which the captured table does not have
        worker.step(first=1, second=1, third=1)
    worker.step(second=1, first=1)
    worker.preempt("second")
    worker.step(second=5, first=1)
    assert worker.graph_steps == 3
    worker.step(second=1, first=1, third=1)
    assert worker.graph_steps == 4
    assert StaticCUDAMetadataBuilder._cudagraph_support is (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )


def test_rows_without_a_query_pad_batches(device):
    worker = StaticWorker(make_plan(31, 48, torch.float32), (4, 2), device)
    worker.padding = 2
    worker.add("one", 40)
    worker.add("two", 40)
    worker.step(one=20, two=1)
    worker.step(one=1, two=1)


def test_single_queries_behind_a_chunk_are_served(device):
    # Model runners put them first; if one did not, an answer would come from the other kernel.
    worker = StaticWorker(make_plan(31, 48, torch.float32), (4, 2), device)
    worker.add("one", 40)
    worker.add("two", 40)
    worker.step(one=20, two=20)
    worker.step(["one", "two"], one=3, two=1)
    worker.step(["two", "one"], one=3, two=1)


def test_profiling_runs_answer_zeros(device):
    worker = StaticWorker(make_plan(31, 48, torch.float32), (4, 2), device, layers=1)
    layer = worker.layers["model.layers.0.attn"]
    impl = layer.impl
    out = torch.full((3, 4, 64), 7.0, device=device)
    assert not impl.forward(layer, out, None, None, None, None, out).any()
    with pytest.raises(NotImplementedError, match="cannot be quantized"):
        impl.forward(layer, out, None, None, None, None, out, output_scale=out)


@pytest.mark.parametrize("quant", QUANTS)
def test_warming_up_runs_every_kernel(device, quant):
    worker = StaticWorker(make_plan(31, 48, torch.float32, quant=quant), (4, 2), device, layers=1)
    order = worker.layers["model.layers.0.attn"].impl.attention.kernels.order
    warm_up_static(worker.plan, order, (4, 2), torch.float32, device, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sliding_window": 128}, "a sliding window"), ({"sinks": torch.zeros(4)}, "attention sinks")],
)
def test_layers_that_cannot_be_served_are_rejected(options, message):
    with pytest.raises(ThinkError, match=f"--kv-select static: .*{message}"):
        StaticCUDABackend.get_impl_cls()(4, 64, 1.0, 2, **options)
