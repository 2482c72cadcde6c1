"""Flags, configs and requests: what the server's process touches."""

from think_vllm.hooks.moved import PLACES
from think_vllm.hooks.patches.patch import Kind, Patch, Role

PATCHES = (
    Patch(
        "vllm.platforms:current_platform.pre_register_and_update",
        Kind.WRAPPED,
        "hooks.platform:pre_register_and_update",
        "it receives every parser of engine arguments, and plugins cannot add flags of their own",
        "plugins can add engine arguments",
        role=Role.PLUGIN,
        parameters=("parser",),
    ),
    Patch(
        "vllm.platforms:current_platform.check_and_update_config",
        Kind.WRAPPED,
        "hooks.platform:check_and_update_config",
        "platforms validate and complete VllmConfig there, and plugins have no such place",
        "plugins receive the finished VllmConfig and can reject it",
        role=Role.PLUGIN,
        parameters=("vllm_config",),
    ),
    Patch(
        "vllm.platforms:current_platform.get_attn_backend_cls",
        Kind.WRAPPED,
        "hooks.backend:get_attn_backend_cls",
        "CPUs ignore attention_config.backend and backend_per_kind, by which layers with a sliding "
        "window could have another backend; on GPUs it names the path that a process then imports",
        "CpuPlatform follows both",
        role=Role.BACKEND,
        parameters=("selected_backend", "attn_selector_config", "num_heads"),
    ),
    Patch(
        "vllm.utils.argparse_utils:FlexibleArgumentParser.parse_known_args",
        Kind.WRAPPED,
        "hooks.flags:parse_known_args",
        "our flags become a part of additional_config, whatever their order on the command line",
        "plugins can add engine arguments",
        role=Role.PARSER,
        parameters=("self", "args", "namespace"),
    ),
    Patch(
        "vllm.utils.argparse_utils:FlexibleArgumentParser.load_config_file",
        Kind.WRAPPED,
        "hooks.config_file:load_config_file",
        "it drops false of options that only the parser of a command knows, so ours would be true",
        "it looks options up in the parser of the command",
        role=Role.PARSER,
        parameters=("self", "file_path"),
    ),
    Patch(
        "vllm.config:AttentionConfig.backend",
        Kind.SET,
        "hooks.backend",
        "it is part of the key by which vLLM caches the choice of a backend",
        "plugins can select the backend of an engine",
        members=("backend_per_kind",),
    ),
    Patch(
        "vllm.v1.attention.selector:_cached_get_attn_backend",
        Kind.CALLED,
        "hooks.backend",
        "its cache knows our backends for thin and for static blocks by one name, so an engine "
        "would get that of an earlier one of its process",
        "the cache's key holds additional_config, or plugins can select the backend of an engine",
    ),
    Patch(
        "vllm.config:CacheConfig.user_specified_block_size",
        Kind.SET,
        "hooks.kv_cache",
        "platforms reset a block size that the user did not name, whenever they validate a config",
        "platforms ask attention backends for their block size, on all devices",
        members=("block_size",),
    ),
    Patch(
        "vllm.config:CacheConfig.enable_prefix_caching",
        Kind.SET,
        "hooks.activation",
        "with --kv-evict h2o a hit would leave out queries whose attention is added up",
        "attention backends can say that they need every query of a prompt",
    ),
    Patch(
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        Kind.WRAPPED,
        "hooks.requests:check_request",
        "a prompt that may grow, or an unknown setting, has to be rejected before it is a request; "
        "Platform.validate_request knows neither the former nor the engine",
        "Platform.validate_request receives the engine's config and whether a session may grow",
        role=Role.FRONT_END,
        parameters=(
            *("self", "request_id", "prompt", "params", "supported_tasks", "arrival_time"),
            *("lora_request", "tokenization_kwargs", "trace_headers", "priority"),
            *("data_parallel_rank", "resumable", "session_id", "kv_hints"),
        ),
        members=("vllm_config",),
        engines_only=True,
    ),
    *(
        Patch(
            " | ".join(f"{place}:{name}" for place in places),
            Kind.CALLED,
            "hooks.moved",
            "vLLM 0.33 has it in another module",
            "the last release that has it in the older place is no longer extended",
        )
        for name, places in PLACES.items()
    ),
)
