"""A worker's step around the CUDA backend, as vLLM's two model runners prepare it.

Requests get their blocks, and lose the tails of compacted spans, as the scheduler would do it;
freed blocks are filled with NaN, so that whoever still reads one is found out.
"""

import random
import zlib
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec

from think_vllm import compat
from think_vllm.attention.cuda_backend import ThinkCUDABackend
from think_vllm.blocks.spec import ThinKVCacheSpec
from think_vllm.planner import BlockPlan
from think_vllm.reference.attention import gather_context
from think_vllm.reference.compaction import compact_spans_ref, dense_tokens
from think_vllm.reference.scoring import (
    key_energy_ref,
    query_energy_ref,
    select_channels_ref,
)

SCALE = 0.2


@dataclass
class Request:
    """One request: what it would feed each layer, and where it stands.

    Args:
        query: [layers, total, Hq, D].
        key: [layers, total, Hk, D].
        value: [layers, total, Hk, D].
    """

    name: str
    prompt_len: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    computed: int = 0
    prefill_len: int = 0
    freed_spans: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.query.shape[1]


def make_request(
    name: str, prompt_len: int, total: int, heads: tuple[int, int], plan: BlockPlan, layers: int = 1
) -> Request:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + total)

    def some(count: int) -> torch.Tensor:
        return torch.randn(layers, total, count, plan.head_size, generator=generator)

    query, key, value = some(heads[0]), some(heads[1]), some(heads[1])
    return Request(name, prompt_len, query, key, value, prefill_len=prompt_len)


def expected_output(request: Request, plan: BlockPlan) -> torch.Tensor:
    """Attention of every token of an undisturbed request, in float64: [layers, total, Hq, D]."""
    return torch.stack(
        [
            _expected_layer(query, key, value, request.prompt_len, plan)
            for query, key, value in zip(request.query, request.key, request.value, strict=True)
        ]
    )


def _expected_layer(query, key, value, prompt_len, plan):
    total, num_kv_heads, head_size = key.shape
    count = -(-total // plan.block_size)
    kv_cache = torch.zeros(count, num_kv_heads, plan.block_size, 2 * head_size)
    halves = kv_cache.view(count, num_kv_heads, 2, -1)
    padded = torch.zeros(count * plan.block_size, num_kv_heads, head_size)
    for half, (tensor, shape) in enumerate(((key, (0, 2, 3, 1)), (value, (0, 2, 1, 3)))):
        padded[:total] = tensor
        blocks = padded.view(count, plan.block_size, num_kv_heads, head_size).permute(shape)
        halves[:, :, half] = blocks.reshape(count, num_kv_heads, -1)
    assert torch.equal(dense_tokens(kv_cache, range(count), total)[0], key.transpose(0, 1))
    table = torch.arange(count, dtype=torch.int32)[None]
    window = query[max(0, prompt_len - plan.config.kv_observation_window) : prompt_len]
    channels = select_channels_ref(
        query_energy_ref(window, num_kv_heads)[None],
        key_energy_ref(kv_cache, table, [0], [prompt_len], plan),
        plan.key_channels,
    )
    out = torch.zeros(query.shape, dtype=torch.float64)
    thin = 0
    for position in range(total):
        spans = plan.rule.thin_spans(prompt_len, position)
        for span in range(thin, spans):
            compact_spans_ref(kv_cache, table, [0], [span], channels, plan)
        if position == 0 or spans > thin:
            # Later tokens are in there too, masked below.
            keys, values = gather_context(kv_cache, table, 0, total, spans, plan)
            group = query.shape[1] // num_kv_heads
            keys, values = (x.repeat_interleave(group, 0) for x in (keys, values))
        thin = spans
        scores = torch.einsum("hd,htd->ht", query[position].double(), keys) * SCALE
        scores[:, position + 1 :] = -torch.inf
        out[position] = torch.einsum("ht,htd->hd", scores.softmax(1), values)
    return out


class _RunnerV1:
    """What ``compat`` reads of ``vllm.v1.worker.gpu_model_runner.GPUModelRunner``."""

    def _determine_batch_execution_and_padding(
        self, *, max_num_scheduled_tokens: int, force_uniform_decode: bool | None = None
    ) -> bool:
        if force_uniform_decode is not None:
            return force_uniform_decode
        return max_num_scheduled_tokens == 1


class _RunnerV2:
    """What ``compat`` reads of ``vllm.v1.worker.gpu.model_runner.GPUModelRunner``."""

    def gather_batch_req_state(self, batch: Any, dummy_run: bool) -> Any:
        return (None if dummy_run else batch), (1 if batch.uniform else None)


compat._wrap_method(_RunnerV1, "_determine_batch_execution_and_padding", compat._watch_v1)
compat._wrap_method(_RunnerV2, "gather_batch_req_state", compat._watch_v2)


class Engine:
    """Scheduler and worker in one.

    Args:
        plan: How blocks are laid out.
        heads: ``Hq`` and ``Hk``.
        device: Of tensors.
        version: Of the model runner: 1 or 2.
        layers: How many.
        graphs: Whether decode batches run as full CUDA graphs do: with the metadata that was
            built before, for more rows than the batch has.
    """

    MAX_REQUESTS = 6
    WIDTH = 40

    def __init__(
        self,
        plan: BlockPlan,
        heads: tuple[int, int],
        version: int,
        device: torch.device,
        layers: int = 1,
        graphs: bool = False,
        num_blocks: int = 120,
        seed: int = 0,
    ) -> None:
        self.plan, self.heads, self.version, self.device = plan, heads, version, device
        self.graphs = graphs
        self.random = random.Random(seed)
        self.requests: dict[str, Request] = {}
        self.rows: list[str] = []  # of V2's request table
        self.free = list(range(1, num_blocks))
        self.graph_steps = 0
        self.block_table = torch.zeros(self.MAX_REQUESTS, self.WIDTH, dtype=torch.int32)
        self.block_table = self.block_table.to(device)
        self.seq_lens = torch.zeros(self.MAX_REQUESTS, dtype=torch.int32, device=device)
        self.config = self._make_config(layers)
        self.layers = self._make_layers(num_blocks, layers)
        spec = FullAttentionSpec(
            block_size=plan.block_size,
            num_kv_heads=heads[1],
            head_size=plan.head_size,
            head_size_v=plan.head_size,
            dtype=torch.float32,
        )
        with (
            patch(
                "think_vllm.attention.cuda_builder.selected_engine",
                return_value=SimpleNamespace(plan=plan),
            ),
            patch.object(compat, "watch_runner"),
        ):
            self.builder = ThinkCUDABackend.get_builder_cls()(
                ThinKVCacheSpec.from_dense(spec, plan),
                [x.layer_name for x in self.layers],
                self.config,
                device,
            )
        self.runner = (_RunnerV1 if version == 1 else _RunnerV2)()
        self.runner.vllm_config = self.config
        self.captured: dict[int, Any] = {}

    def _make_config(self, layers: int) -> Any:
        return SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=self.MAX_REQUESTS),
            compilation_config=SimpleNamespace(static_forward_context={}),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
            speculative_config=None,
            attention_config=SimpleNamespace(backend=AttentionBackendEnum.CUSTOM),
            use_v2_model_runner=self.version == 2,
        )

    def _make_layers(self, num_blocks: int, layers: int) -> list[Any]:
        plan, made = self.plan, []
        # Layers of a group may share one allocation.
        shape = (num_blocks, layers, self.heads[1], plan.block_size, 2 * plan.head_size)
        memory = torch.full(shape, torch.nan, device=self.device)
        with (
            patch("think_vllm.attention.cuda_impl.get_current_vllm_config"),
            # On a GPU there is one, which has no float32.
            patch("think_vllm.attention.cuda_impl.load_flash", return_value=None),
            patch("think_vllm.attention.cuda_impl.remember_plan", return_value=plan),
        ):
            for i in range(layers):
                impl = ThinkCUDABackend.get_impl_cls()(
                    self.heads[0], plan.head_size, SCALE, self.heads[1], None, None, "auto"
                )
                layer = SimpleNamespace(layer_name=f"layer.{i}", impl=impl, kv_cache=memory[:, i])
                self.config.compilation_config.static_forward_context[layer.layer_name] = layer
                made.append(layer)
        return made

    def add(self, request: Request) -> None:
        self.requests[request.name] = request
        if request.name not in self.rows:
            if "" in self.rows:
                self.rows[self.rows.index("")] = request.name
            else:
                self.rows.append(request.name)

    def preempt(self, request: Request) -> None:
        """Take everything from a request; it starts anew, its output included."""
        self._release(request, request.blocks)
        request.blocks = []
        request.prefill_len = max(request.prompt_len, request.computed)
        request.computed = request.freed_spans = 0
        if request.name in self.rows:
            self.rows[self.rows.index(request.name)] = ""

    def finish(self, request: Request) -> None:
        self.preempt(request)
        del self.requests[request.name]

    def _release(self, request: Request, blocks: list[int]) -> None:
        for block in blocks:
            if block:
                for layer in self.layers:
                    layer.kv_cache[block] = torch.nan
                self.free.append(block)

    def _allocate(self, request: Request, tokens: int) -> None:
        rule = self.plan.rule
        freeable = rule.freeable_spans(request.prompt_len, request.computed)
        for span in range(request.freed_spans, freeable):
            first = span * rule.span_blocks
            tail = slice(first + rule.thin_blocks, first + rule.span_blocks)
            self._release(request, request.blocks[tail])
            # The worker's rows keep the numbers of blocks that are gone.
            request.blocks[tail] = [0] * (rule.span_blocks - rule.thin_blocks)
        request.freed_spans = max(request.freed_spans, freeable)
        while len(request.blocks) * self.plan.block_size < request.computed + tokens:
            request.blocks.append(self.free.pop(self.random.randrange(len(self.free))))

    def step(self, work: dict[str, int]) -> dict[str, torch.Tensor]:
        """Run a step with so many tokens of each request.

        Returns:
            Per request the output of these tokens: [layers, tokens, Hq, D].
        """
        names = list(work)
        self.random.shuffle(names)
        if self.version == 2:
            names.sort(key=lambda name: work[name])
            for name in names:
                self.add(self.requests[name])
        batch = [self.requests[name] for name in names]
        counts = [work[name] for name in names]
        for request, count in zip(batch, counts, strict=True):
            self._allocate(request, count)
        full_graph = self._announce(batch, counts)
        common = self._metadata(batch, counts, full_graph)
        metadata = self.builder.build(0, common)
        if full_graph:
            self.graph_steps += 1
            metadata = self.captured[common.num_reqs]
        outputs = [
            self._forward(i, batch, counts, common, metadata) for i in range(len(self.layers))
        ]
        result = {}
        for request, start, count in zip(batch, np.cumsum([0, *counts]), counts, strict=False):
            result[request.name] = torch.stack([out[start : start + count] for out in outputs])
            request.computed += count
        return result

    def dummy(self, rows: int, tokens: int) -> Any:
        """Build the metadata of a run without requests, as vLLM warms up."""
        if self.version == 1:
            self.runner._determine_batch_execution_and_padding(
                max_num_scheduled_tokens=tokens, force_uniform_decode=False
            )
        else:
            self.runner.gather_batch_req_state(SimpleNamespace(uniform=False), True)
        self.block_table[:rows] = 0
        lens = np.full(rows, tokens, np.int32)
        common = self._common([tokens] * rows, rows, tokens * np.arange(rows + 1), lens, tokens)
        return self.builder.build(0, common)

    def capture(self, rows: int) -> None:
        """Build the metadata of a graph for ``rows`` rows."""
        common = self._common([0] * rows, rows, np.arange(rows + 1), np.ones(rows, np.int32), rows)
        self.captured[rows] = self.builder.build_for_cudagraph_capture(common)

    def _announce(self, batch: list[Request], counts: list[int]) -> bool:
        """Let the wrapped method of the runner see the batch; whether it may run as a graph."""
        if self.version == 1:
            self.runner.requests = self.requests
            self.runner.input_batch = SimpleNamespace(
                req_ids=[request.name for request in batch],
                num_reqs=len(batch),
                # Rows behind the batch hold what earlier batches have left.
                num_prompt_tokens=np.array([r.prompt_len for r in batch] + [999], np.int32),
                num_computed_tokens_cpu=np.array([r.computed for r in batch] + [3], np.int32),
            )
            uniform = self.runner._determine_batch_execution_and_padding(
                max_num_scheduled_tokens=max(counts)
            )
        else:
            table = {name: row for row, name in enumerate(self.rows) if name}
            lens = [self.requests[name].prompt_len if name else 0 for name in self.rows]
            self.runner.req_states = SimpleNamespace(
                prompt_len=SimpleNamespace(np=np.array(lens, np.int32)), req_id_to_index=table
            )
            state = SimpleNamespace(
                req_ids=[request.name for request in batch],
                idx_mapping_np=np.array([table[request.name] for request in batch]),
                has_prefill=any(r.computed < r.prefill_len for r in batch),
                uniform=max(counts) == 1,
            )
            _, tokens = self.runner.gather_batch_req_state(state, False)
            uniform = tokens == 1
        return bool(uniform) and self.graphs

    def _metadata(
        self, batch: list[Request], counts: list[int], full_graph: bool
    ) -> CommonAttentionMetadata:
        num_reqs = len(batch)
        rows = min(self.MAX_REQUESTS, num_reqs + 2) if full_graph else num_reqs
        if full_graph and rows not in self.captured:
            self.capture(rows)
        starts = np.full(rows + 1, sum(counts))
        starts[: num_reqs + 1] = np.cumsum([0, *counts])
        lens = np.zeros(rows, np.int32)
        lens[:num_reqs] = [r.computed + n for r, n in zip(batch, counts, strict=True)]
        self.block_table.random_(100)
        for row, request in enumerate(batch):
            self.block_table[row, : len(request.blocks)] = torch.tensor(request.blocks)
        self.block_table[num_reqs:rows] = 0
        return self._common(counts, rows, starts, lens, max(counts))

    def _common(self, counts, rows, starts, lens, longest) -> CommonAttentionMetadata:
        self.seq_lens[:rows] = torch.from_numpy(lens)
        self.seq_lens[rows:] = 0
        starts = torch.from_numpy(starts.astype(np.int32))
        # V1 fills both in for padding rows too, V2 for requests only.
        filled = len(counts) if self.version == 2 else rows
        return CommonAttentionMetadata(
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts,
            seq_lens=self.seq_lens[:rows],
            seq_lens_cpu_upper_bound=torch.from_numpy(lens),
            num_reqs=rows,
            num_actual_tokens=max(rows, int(starts[-1])) if self.graphs else int(starts[-1]),
            max_query_len=longest,
            max_seq_len=int(lens.max()),
            block_table_tensor=self.block_table[:rows],
            slot_mapping=torch.zeros(0, dtype=torch.int64),
            is_prefilling=torch.zeros(filled, dtype=torch.bool),
            req_idx=np.arange(filled) if self.version == 2 else None,
        )

    def _forward(self, index, batch, counts, common, metadata) -> torch.Tensor:
        layer, plan = self.layers[index], self.plan
        padding = common.num_actual_tokens - sum(counts)
        slots = [
            request.blocks[p // plan.block_size] * plan.block_size + p % plan.block_size
            for request, count in zip(batch, counts, strict=True)
            for p in range(request.computed, request.computed + count)
        ]
        slot_mapping = torch.tensor(slots + [-1] * padding, device=self.device)

        def gather(name: str) -> torch.Tensor:
            parts = [
                getattr(request, name)[index, request.computed : request.computed + count]
                for request, count in zip(batch, counts, strict=True)
            ]
            tensor = torch.cat(parts)
            rest = torch.full((padding, *tensor.shape[1:]), torch.nan)
            return torch.cat([tensor, rest]).to(self.device)

        query, key, value = gather("query"), gather("key"), gather("value")
        out = torch.full_like(query, torch.nan)
        layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slot_mapping)
        layer.impl.forward(layer, query, key, value, layer.kv_cache, metadata, out)
        assert torch.isfinite(out[: sum(counts)]).all()
        return out[: sum(counts)].cpu()
