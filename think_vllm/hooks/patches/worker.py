"""Steps, layers and kernels."""

from think_vllm.hooks.patches.patch import Kind, Patch, Role

RUNNER_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
RUNNER_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
_CPU = "vllm.v1.attention.backends.cpu_attn"
_METADATA = "CommonAttentionMetadata has request ids, prompt lengths and block tables on the host"

PATCHES = (
    Patch(
        f"{RUNNER_V1}._update_states",
        Kind.WRAPPED,
        "hooks.model_runner:_admit_v1",
        "it receives the sampling parameters of new requests",
        _METADATA,
        role=Role.WORKER_V1,
        parameters=("self", "scheduler_output"),
        members=("requests",),
        engines_only=True,
    ),
    Patch(
        f"{RUNNER_V1}._determine_batch_execution_and_padding",
        Kind.WRAPPED,
        "hooks.model_runner:_observe_v1",
        "builders need a step's requests, prompt lengths and cached thin spans; and batches with "
        "the last token of a prompt must run without a full graph, as channels are chosen after it",
        f"{_METADATA}, and backends can reject a batch for full CUDA graphs",
        role=Role.WORKER_V1,
        members=("input_batch",),
        engines_only=True,
    ),
    Patch(
        "vllm.v1.worker.gpu_input_batch:InputBatch.block_table",
        Kind.READ,
        "hooks.model_runner",
        "null blocks in a row show which spans came thin from the prefix cache",
        _METADATA,
        members=("req_ids", "num_reqs", "num_prompt_tokens", "num_computed_tokens_cpu"),
    ),
    Patch(
        f"{RUNNER_V2}.gather_batch_req_state",
        Kind.WRAPPED,
        "hooks.model_runner:_observe_v2",
        "as with V1's _determine_batch_execution_and_padding",
        f"{_METADATA}, and backends can reject a batch for full CUDA graphs",
        role=Role.WORKER_V2,
        device="cuda",
        parameters=("self", "scheduler_output", "dummy_run"),
        members=("req_states",),
        engines_only=True,
    ),
    Patch(
        "vllm.v1.core.sched.output:SchedulerOutput.scheduled_new_reqs",
        Kind.READ,
        "hooks.model_runner",
        "V2 has a request's blocks on the host only in the step that admits it",
        _METADATA,
        device="cuda",
    ),
    Patch(
        "vllm.config:CompilationConfig.static_forward_context",
        Kind.READ,
        "worker",
        "builders find their layers there: their caches, to compact spans ahead of a full CUDA "
        "graph, and where to put their static channels",
        "builders receive their layers",
    ),
    Patch(
        "vllm.v1.attention.backends.fa_utils:get_flash_attn_version",
        Kind.CALLED,
        "worker.cuda.flash",
        "FlashAttention is the fastest way through a prompt of dense blocks, and comes with vLLM",
        None,
        device="cuda",
    ),
    Patch(
        "vllm.v1.attention.backend:AttentionMetadataBuilder",
        Kind.SUBCLASSED,
        "worker",
        "requests with one query come first, and batches of them replay as full CUDA graphs",
        None,
        members=("_init_reorder_batch_threshold", "_cudagraph_support"),
    ),
    Patch(
        f"{_CPU}:CPUAttentionMetadataBuilder",
        Kind.SUBCLASSED,
        "worker.cpu",
        "vLLM's C++ kernels store dense blocks and attend within prompts",
        None,
        device="cpu",
        members=("_set_isa_to_layers",),
    ),
    Patch(
        f"{_CPU}:CPUAttentionBackendImpl",
        Kind.SUBCLASSED,
        "worker.cpu",
        "vLLM's C++ kernels store dense blocks and attend within prompts",
        None,
        device="cpu",
    ),
)
