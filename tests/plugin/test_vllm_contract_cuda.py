"""What the CUDA side overrides, wraps or calls in vLLM; see ``test_vllm_contract.py``.

Its modules are imported here on the CPU too. Where they cannot be, or say only inside a function
what they have, their source is read.
"""

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from vllm.model_executor.layers.attention import attention
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.core.sched.scheduler import Scheduler

from tests.support.contract import check_members, check_parameters, name_of, tight
from tests.support.flash import FlashStandIn
from think_vllm.hooks.model_runner import hook_runner, step_rows
from think_vllm.plan.layout import BlockForm
from think_vllm.plan.spans import SpanRule
from think_vllm.worker.token_selection import split_runs

BACKEND, BUILDER = "worker/cuda/backend.py", "worker/cuda/builder.py"
IMPL, PARTS = "worker/cuda/impl.py", "worker/cuda/metadata.py"
LAYER, STATIC = "worker/cuda/layer.py", "worker/static/cuda_builder.py"
ACTIVATION, RUNNER = "hooks/engine_support.py", "hooks/model_runner.py"


def names(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("ours", "function", "parameters"),
    [
        (
            BUILDER,
            "v1.attention.backend:AttentionMetadataBuilder.__init__",
            ["self", "kv_cache_spec", "layer_names", "vllm_config", "device"],
        ),
        (
            BUILDER,
            "v1.attention.backend:AttentionMetadataBuilder.build",
            ["self", "common_prefix_len", "common_attn_metadata", "fast_build"],
        ),
        (
            BUILDER,
            "v1.attention.backend:AttentionMetadataBuilder.build_for_cudagraph_capture",
            ["self", "common_attn_metadata"],
        ),
        (
            BUILDER,
            "v1.attention.backend:AttentionMetadataBuilder._init_reorder_batch_threshold",
            [
                "self",
                "reorder_batch_threshold",
                "supports_spec_as_decode",
                "supports_dcp_with_varlen",
            ],
        ),
        (
            LAYER,
            "v1.attention.backend:AttentionImpl.__init__",
            [
                "self",
                "num_heads",
                "head_size",
                "scale",
                "num_kv_heads",
                "alibi_slopes",
                "sliding_window",
                "kv_cache_dtype",
                "logits_soft_cap",
                "attn_type",
                "kv_sharing_target_layer_name",
            ],
        ),
        (
            IMPL,
            "v1.attention.backend:AttentionImpl.forward",
            [
                "self",
                "layer",
                "query",
                "key",
                "value",
                "kv_cache",
                "attn_metadata",
                "output",
                "output_scale",
                "output_block_scale",
            ],
        ),
        ("worker/static/cuda.py", "config.vllm:get_current_vllm_config", []),
        (BACKEND, "v1.attention.backend:AttentionBackend.supported_kv_cache_layouts", []),
        (
            BACKEND,
            "v1.attention.backend:AttentionBackend.get_supported_kernel_block_sizes",
            ["kv_cache_spec"],
        ),
        (BACKEND, "v1.attention.backend:AttentionBackend.get_supported_head_sizes", []),
        (
            BACKEND,
            "v1.attention.backend:AttentionBackend.supports_compute_capability",
            ["capability"],
        ),
        (BACKEND, "v1.attention.backend:AttentionBackend.supports_kv_connector", []),
        (PARTS, "utils.torch_utils:async_tensor_h2d", ["data", "device", "dtype", "out"]),
        (
            ACTIVATION,
            "platforms.interface:Platform.has_device_capability",
            ["capability", "device_id"],
        ),
        (ACTIVATION, "platforms.interface:Platform.get_device_capability", ["device_id"]),
    ],
    ids=name_of,
)
def test_vllm_signature_is_what_we_rely_on(ours: str, function: str, parameters: list[str]) -> None:
    check_parameters(ours, function, parameters)


@pytest.mark.parametrize(
    ("ours", "kind", "expected"),
    [
        (
            BUILDER,
            "v1.attention.backend:CommonAttentionMetadata",
            {"seq_lens_cpu_upper_bound", "query_start_loc_cpu", "num_reqs"},
        ),
        (
            STATIC,
            "v1.attention.backend:CommonAttentionMetadata",
            {"query_start_loc", "query_start_loc_cpu", "seq_lens", "num_reqs", "max_seq_len"}
            | {"block_table_tensor"},
        ),
        (STATIC, "v1.attention.backend:AttentionCGSupport", {"UNIFORM_SINGLE_TOKEN_DECODE"}),
        (BUILDER, "config.scheduler:SchedulerConfig", {"max_num_seqs"}),
        (ACTIVATION, "config.parallel:ParallelConfig", {"use_ubatching"}),
        (RUNNER, "config.vllm:VllmConfig", {"use_v2_model_runner"}),
        (ACTIVATION, "platforms.interface:Platform", {"is_cpu", "is_cuda", "device_name"}),
        (
            BACKEND,
            "v1.attention.backend:AttentionBackend",
            {"forward_includes_kv_cache_update"},
        ),
        (BUILDER, "v1.attention.backend:AttentionCGSupport", {"UNIFORM_SINGLE_TOKEN_DECODE"}),
        (BACKEND, "v1.kv_cache_layout:KVCacheLayout", {"LBHNC"}),
    ],
    ids=name_of,
)
def test_vllm_members_are_what_we_rely_on(ours: str, kind: str, expected: set[str]) -> None:
    check_members(ours, kind, expected)


def test_vllm_stores_keys_by_an_operator_of_its_own() -> None:
    called = "attn_layer.impl.do_kv_cache_update(#type:ignore[attr-defined]attn_layer,key,value,"
    assert called + "kv_cache,layer_slot_mapping,)" in tight(attention.unified_kv_cache_update)


def test_vllm_graphs_are_captured_for_the_longest_context() -> None:
    # A captured launch has as many splits as that wants, and lengths are read from where they lie.
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    v2 = tight(DefaultModelState.prepare_attn)
    assert "iffor_capture:" in v2
    assert "max_seq_len=self.max_model_len" in v2
    v1 = tight(GPUModelRunner._build_attention_metadata)
    assert "query_start_loc=self.query_start_loc.gpu[:num_reqs_padded+1]" in v1
    assert "seq_lens=self.seq_lens" in v1
    # Rows that pad a batch have no tokens: in V1 by this, in V2 by its kernel.
    assert "self.seq_lens[num_reqs:].fill_(0)" in tight(GPUModelRunner._prepare_inputs)


def test_vllm_flash_attention_is_what_we_rely_on() -> None:
    version = names(fa_utils.get_flash_attn_version)
    assert {"head_size", "requires_softcap"} <= set(version)
    path = Path(vllm.__file__).parent / "vllm_flash_attn" / "flash_attn_interface.py"
    defined = {
        x.name: x for x in ast.parse(path.read_text()).body if isinstance(x, ast.FunctionDef)
    }
    function = defined["flash_attn_varlen_func"]
    parameters = [argument.arg for argument in function.args.args]
    # What the stand-in of our tests takes, it takes too; tests/triton calls that as we do.
    taken = names(FlashStandIn.__call__)[1:]
    assert [name for name in parameters if name in taken] == taken
    assert {
        "cu_seqlens_q",
        "cu_seqlens_k",
        "max_seqlen_q",
        "max_seqlen_k",
        "seqused_k",
        "block_table",
        "softmax_scale",
        "softcap",
        "causal",
        "fa_version",
    } <= set(taken)
    body = ast.unparse(function).replace(" ", "")
    # Pages need lengths, and those exclude starts of keys.
    assert "cu_seqlens_kisNoneorseqused_kisNone" in body
    assert "assertblock_tableisNoneorseqused_kisnotNone" in body
    assert "causalmaskisalignedtothebottomright" in body


def test_vllm_flash_attention_reads_our_dense_blocks() -> None:
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    # Rows of a key and a value, as ``BlockForm.GPU`` has them, read and stored.
    views = "key_cache,value_cache=kv_cache.transpose(1,2).split(self.head_size,dim=-1)"
    forward = tight(FlashAttentionImpl.forward)
    assert views in forward
    assert views in tight(FlashAttentionImpl.do_kv_cache_update)
    for passed in ("k=key_cache", "v=value_cache", "seqused_k=seqused_k", "block_table=block_table",
                   "cu_seqlens_q=cu_seqlens_q", "max_seqlen_k=max_seqlen_k"):  # fmt: skip
        assert passed in forward
    kv_cache = torch.arange(3 * 2 * 16 * 128).view(3, 2, 16, 128)
    keys, values = kv_cache.transpose(1, 2).split(64, dim=-1)
    ours = split_runs(kv_cache, SimpleNamespace(block_size=16, head_size=64), BlockForm.GPU)  # type: ignore[arg-type]
    assert torch.equal(ours[0].permute(0, 3, 1, 2), keys)
    assert torch.equal(ours[1].transpose(1, 2), values)


def test_vllm_runner_v2_is_what_we_watch() -> None:
    from vllm.v1.worker.gpu import model_runner as v2
    from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    from vllm.v1.worker.gpu.states import RequestState

    # Preempted requests forget their rows, and come back as new ones with all their blocks.
    assert "finished_req_ids.union(preempted_req_ids)" in tight(v2.GPUModelRunner.finish_requests)
    assert (
        "ifself.use_v2_model_runner:scheduled_new_reqs.extend(scheduled_resumed_reqs)"
        "scheduled_resumed_reqs.clear()" in tight(Scheduler.schedule)
    )
    assert "req_to_new_blocks[request_id]=self.kv_cache_manager.get_blocks(request_id)" in tight(
        Scheduler.schedule
    )
    assert {"req_id", "block_ids", "num_computed_tokens"} <= set(NewRequestData.__annotations__)
    fields = v2.BatchReqState._fields
    assert {"req_ids", "idx_mapping_np", "has_prefill"} <= set(fields)
    assert "self.prompt_len=UvaBackedTensor(" in tight(RequestState.__init__)
    assert "self.req_id_to_index:dict" in tight(RequestState.__init__)
    assert "self.np=" in tight(UvaBackedTensor.__init__)
    run = tight(v2.GPUModelRunner.execute_model)
    # Rows are known before their metadata is built, and decide about full graphs.
    order = [
        run.index("self.finish_requests(scheduler_output)"),
        run.index("self.add_requests(scheduler_output)"),
        run.index("batch_req_state,uniform_tok_count=self.gather_batch_req_state("),
        run.index("dispatch_cg_and_sync_dp("),
        run.index("self.model_state.prepare_attn("),
    ]
    assert order == sorted(order)
    assert "ifbatch_req_state.has_prefill:" in run
    # Capture and dummy replays build their metadata apart.
    assert "for_capture=dummy_runandbatch_desc.cg_mode==CUDAGraphMode.FULL" in run
    assert "seq_lens_cpu_upper_bound=seq_lens_cpu_upper_bound" in tight(
        DefaultModelState.prepare_attn
    )


def test_vllm_runner_v1_is_what_we_watch() -> None:
    from vllm.v1.worker.block_table import BlockTable, MultiGroupBlockTable
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_input_batch import InputBatch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    parameters = names(GPUModelRunner._determine_batch_execution_and_padding)
    # On CPUs, too, where eviction asks whose rows a step has.
    assert issubclass(CPUModelRunner, GPUModelRunner)
    assert "_determine_batch_execution_and_padding" not in vars(CPUModelRunner)
    assert "force_uniform_decode" in parameters
    run, dummy = tight(GPUModelRunner.execute_model), tight(GPUModelRunner._dummy_run)
    assert "force_uniform_decode" not in run
    assert "force_uniform_decode=uniform_decode" in dummy
    order = [
        run.index("self._update_states(scheduler_output)"),
        run.index("self._determine_batch_execution_and_padding("),
        run.index("self._build_attention_metadata("),
    ]
    assert order == sorted(order)
    assert isinstance(InputBatch.req_ids, property)
    assert isinstance(InputBatch.num_reqs, property)
    batch = tight(InputBatch.__init__)
    assert "self.num_prompt_tokens=self.num_prompt_tokens_cpu_tensor.numpy()" in batch
    assert "self.num_computed_tokens_cpu=self.num_computed_tokens_cpu_tensor.numpy()" in batch
    assert "self.block_table=MultiGroupBlockTable(" in batch
    assert "self.block_table.add_row(request.block_ids,req_index)" in tight(InputBatch.add_request)
    assert names(MultiGroupBlockTable.__getitem__) == ["self", "idx"]
    assert names(BlockTable.get_numpy_array) == ["self"]
    # Rows are appended to, so what was null at the beginning stays so.
    assert "self.block_table.np[row_idx,start:start+num_blocks]=block_ids" in tight(
        BlockTable.append_row
    )
    assert "req_state.block_ids=new_block_ids" in tight(GPUModelRunner._update_states)
    assert "self.requests:dict[str,CachedRequestState]" in tight(GPUModelRunner.__init__)
    built = tight(GPUModelRunner._build_attention_metadata)
    assert "seq_lens_cpu_upper_bound=self.optimistic_seq_lens_cpu[:num_reqs_padded]" in built


@pytest.mark.parametrize("use_v2", [False, True])
def test_watching_a_runner_wraps_it_once(use_v2: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if use_v2:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        name = "gather_batch_req_state"
    else:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        name = "_determine_batch_execution_and_padding"
    calls: list[Any] = []

    def original(self: Any, *args: Any, **kwargs: Any) -> tuple[None, int]:
        calls.append((args, kwargs))
        return None, 1

    monkeypatch.setattr(GPUModelRunner, name, original)
    config = SimpleNamespace(use_v2_model_runner=use_v2)
    rule = SpanRule(2, 3, 2, 5, True)
    hook_runner(config, rule, None)  # type: ignore[arg-type]
    wrapped = getattr(GPUModelRunner, name)
    hook_runner(config, rule, None)  # type: ignore[arg-type]
    assert getattr(GPUModelRunner, name) is wrapped
    # Runners without thin blocks, and dummy runs of those with, see the original.
    arguments: dict[str, Any] = {"scheduler_output": None, "dummy_run": True}
    if not use_v2:
        arguments = {"num_tokens": 1, "force_uniform_decode": True}
    for backend in (None, AttentionBackendEnum.CUSTOM):
        runner = SimpleNamespace(
            vllm_config=SimpleNamespace(attention_config=SimpleNamespace(backend=backend))
        )
        assert wrapped(runner, **arguments) == (None, 1)
    assert len(calls) == 2
    assert step_rows() is None
