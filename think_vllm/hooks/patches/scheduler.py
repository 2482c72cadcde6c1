"""The block manager, and the requests that it has to know."""

from think_vllm.hooks.patches.patch import Kind, Patch, Role

PATCHES = (
    Patch(
        "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry._ensure_registered",
        Kind.CALLED,
        "hooks.kv_cache",
        "a spec that is registered before vLLM's own keeps those from being registered",
        "it no longer returns early if the registry is not empty",
        parameters=("vllm_config",),
    ),
    Patch(
        "vllm.v1.core.sched.scheduler:Scheduler.add_request",
        Kind.WRAPPED,
        "hooks.scheduler:add_request",
        "block managers know requests by their ids, and without prefix caching never see one",
        "block managers receive a request's settings",
        role=Role.SCHEDULER,
        parameters=("self", "request"),
        members=("kv_cache_manager", "requests"),
        engines_only=True,
    ),
    Patch(
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager",
        Kind.SUBCLASSED,
        "scheduler.manager",
        "our block manager frees the tails of spans, and copies blocks that others still read",
        "block managers have a documented interface",
        members=("_pending_cow_copies", "_remove_blocks_in_range", "_apply_cow"),
    ),
    Patch(
        "vllm.v1.core.block_pool:BlockPool._insert_block_hash",
        Kind.CALLED,
        "hooks.kv_cache",
        "thin blocks are cached under keys of their own",
        "block managers can select the keys of their blocks",
        parameters=("self", "block_hash_with_group_id", "block", "num_tokens"),
    ),
    Patch(
        "vllm.v1.core.kv_cache_utils:KVCacheBlock.ref_cnt",
        Kind.SET,
        "scheduler.copies",
        "a block that is copied before the step overwrites it must stay until the copy has run",
        "block managers can hold blocks for a step",
    ),
    Patch(
        "vllm.v1.request:Request.block_hashes",
        Kind.SET,
        "scheduler",
        "a preempted request must not hit its own thin spans, nor one that stays dense any",
        "block managers receive the request whose prefix is looked up",
    ),
)
