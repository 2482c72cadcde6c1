"""Turn thin blocks on for one engine: check its config, plan its blocks, complete it."""

from __future__ import annotations

import logging
import multiprocessing
from typing import TYPE_CHECKING, Any

from think_vllm import VLLM_SERIES, __version__, compat, compat_metrics, compat_requests
from think_vllm.config import ThinkConfig, config_from_additional, prune_flags
from think_vllm.errors import FLAGS, WAY_OUT, ThinkError
from think_vllm.models import attention_layers, check_model, window_summary
from think_vllm.planner import BlockPlan, plan_blocks
from think_vllm.report import context_hint, plan_summary, static_summary

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = logging.getLogger("vllm.think_vllm")

#: Least compute capability of a GPU, and least head size there: what the kernels are made for.
CUDA_CAPABILITY = 80
CUDA_MIN_HEAD_SIZE = 64


def activate(vllm_config: VllmConfig) -> None:
    """Check and complete a config that asks for thin blocks; leave any other one alone.

    Runs again whenever vLLM validates a config, so every step is idempotent.

    Raises:
        ThinkError: If this engine cannot be served with thin blocks.
    """
    config = config_from_additional(vllm_config.additional_config)
    if config is None or vllm_config.model_config is None:
        return
    if config.is_static:
        from think_vllm.static.activation import activate_static

        static = activate_static(config, vllm_config)
        if static is None:
            _say_off(config)
        else:
            _say(static_summary(static))
            compat_requests.watch_front_end()
            if not _is_cpu():
                _warn_of_gpus()
        return
    check_engine(vllm_config)
    plan = plan_engine(config, vllm_config)
    if config.guards:
        check_guard(vllm_config)
    if plan is None:
        _say_off(config)
        return
    cache_config = vllm_config.cache_config
    # Before it is ours. When vLLM validates a config again, the hint has been given.
    user_block_size = cache_config.block_size if cache_config.user_specified_block_size else None
    compat.fix_block_size(cache_config, plan.block_size)
    if config.kv_evict == "h2o" and cache_config.enable_prefix_caching:
        # A prompt whose beginning came from the cache would choose by half of its queries.
        cache_config.enable_prefix_caching = False
        logger.info(
            "think-vllm: --kv-evict h2o adds up all queries of a prompt, so each is computed "
            "whole; prefix caching is off"
        )
    compat.claim_custom_backend(vllm_config)
    compat_requests.watch_front_end()
    compat_metrics.watch_front_end()
    if _is_cpu():
        compat.request_prompt_lens(vllm_config.model_config)
    else:
        _warn_of_gpus()
    lines = plan_summary(plan) + window_summary(attention_layers(vllm_config.model_config))
    longest = vllm_config.model_config.max_model_len
    if longest < config.kv_plan_context:
        lines += context_hint(plan, longest, user_block_size)
    _say(lines)


def refuse_version(vllm_config: VllmConfig) -> None:
    """Stand-in for ``activate`` on a vLLM that this version does not extend.

    Raises:
        ThinkError: If the config asks for thin blocks.
    """
    if config_from_additional(vllm_config.additional_config) is None:
        return
    import vllm

    raise ThinkError(
        f"thin KV blocks: think-vllm {__version__} works with vLLM {VLLM_SERIES}.*, this is "
        f"{vllm.__version__}; install vllm=={VLLM_SERIES}.*. {WAY_OUT}"
    )


def select_backend(vllm_config: VllmConfig, has_window: bool = False) -> str | None:
    """Path of the attention backend for an engine, None if it has no thin blocks.

    Args:
        vllm_config: Of the engine.
        has_window: Whether the layer has a sliding window. Then its blocks are never thin.
    """
    config = config_from_additional(vllm_config.additional_config)
    if config is not None and config.is_static:
        from think_vllm.static.activation import plan_static_engine

        if plan_static_engine(config, vllm_config) is None:
            return None
        return compat.CPU_STATIC_BACKEND_PATH if _is_cpu() else compat.CUDA_STATIC_BACKEND_PATH
    if engine_plan(vllm_config) is None:
        return None
    if not _is_cpu():
        return compat.CUDA_BACKEND_PATH
    return compat.CPU_WINDOW_BACKEND_PATH if has_window else compat.CPU_BACKEND_PATH


def engine_plan(vllm_config: VllmConfig) -> BlockPlan | None:
    """Plan the blocks of an engine; None if its config asks for none that become thin.

    With ``--kv-select static`` blocks are as they are from the first token on: see ``static/``.
    """
    config = config_from_additional(vllm_config.additional_config)
    if config is None or config.is_static:
        return None
    return plan_engine(config, vllm_config)


def plan_engine(config: ThinkConfig, vllm_config: VllmConfig) -> BlockPlan | None:
    """Plan the blocks of an engine; the same in every process of it.

    Raises:
        ThinkError: If no plan fits.
    """
    model_config, cache_config = vllm_config.model_config, vllm_config.cache_config
    if attention_layers(model_config).window:
        # Beside them vLLM may cut a hit in the middle of a thin span.
        config = config.model_copy(update={"kv_prefix_cache": "dense"})
    return plan_blocks(
        config,
        head_size=model_config.get_head_size(),
        itemsize=model_config.dtype.itemsize,
        block_size=cache_config.block_size if cache_config.user_specified_block_size else None,
    )


def check_engine(vllm_config: VllmConfig) -> None:
    """Refuse what is not supported with thin blocks.

    Raises:
        ThinkError: Naming the option or the property of the model, and the way out.
    """
    check_device(vllm_config)
    check_model(vllm_config.model_config)
    check_windows(vllm_config)
    parallel = vllm_config.parallel_config
    cache_dtype = vllm_config.cache_config.cache_dtype
    unsupported: list[tuple[Any, str, str, str]] = [
        (
            vllm_config.speculative_config,
            "--speculative-config",
            "a rejected token rolls its request back, and thin blocks cannot become dense again",
            "leave it out",
        ),
        (
            vllm_config.kv_transfer_config,
            "--kv-transfer-config (a KV connector)",
            "connectors move dense blocks and know nothing of channel tables",
            "leave it out",
        ),
        (
            vllm_config.kv_events_config is not None
            and vllm_config.kv_events_config.enable_kv_cache_events,
            "--kv-events-config",
            "blocks change their form without an event",
            "leave it out",
        ),
        # vLLM turns this into a KV connector only later.
        (
            vllm_config.cache_config.kv_offloading_size,
            "--kv-offloading-size",
            "offloading moves dense blocks and knows nothing of channel tables",
            "leave it out",
        ),
        (
            parallel.decode_context_parallel_size > 1,
            f"--decode-context-parallel-size {parallel.decode_context_parallel_size}",
            "it cuts spans into pieces on several ranks",
            "use 1",
        ),
        (
            parallel.prefill_context_parallel_size > 1,
            f"--prefill-context-parallel-size {parallel.prefill_context_parallel_size}",
            "it cuts spans into pieces on several ranks",
            "use 1",
        ),
        (
            vllm_config.cache_config.kv_sharing_fast_prefill,
            "--kv-sharing-fast-prefill",
            "queries that choose channels would be left out",
            "leave it out",
        ),
        (
            cache_dtype not in _plain_dtypes(vllm_config.model_config),
            f"--kv-cache-dtype {cache_dtype}",
            "blocks that are dense hold keys and values as computed",
            "use --kv-quant fp8 instead" if cache_dtype.startswith("fp8") else "use auto",
        ),
    ]
    for present, name, reason, way_out in unsupported:
        if present:
            raise ThinkError(
                f"thin KV blocks do not support {name} yet: {reason}; {way_out}, or serve without "
                f"{FLAGS}"
            )


def check_device(vllm_config: VllmConfig) -> None:
    """Refuse devices that there are no kernels for, and what they cannot do.

    Raises:
        ThinkError: Naming the device or the option, and the way out.
    """
    from vllm import envs
    from vllm.platforms import current_platform

    if _is_cpu():
        if vllm_config.use_v2_model_runner:
            raise ThinkError(
                "thin KV blocks do not support vLLM's model runner V2 on CPUs yet; set "
                f"VLLM_USE_V2_MODEL_RUNNER=0, or serve without {FLAGS}"
            )
        return
    if not current_platform.is_cuda():
        raise ThinkError(
            "thin KV blocks: there are kernels for CPUs and for NVIDIA GPUs, the device is "
            f"{current_platform.device_name}. {WAY_OUT}"
        )
    if not current_platform.has_device_capability(CUDA_CAPABILITY):
        found = current_platform.get_device_capability()
        raise ThinkError(
            f"thin KV blocks: the GPU has compute capability {found.as_version_str()}; the "
            f"kernels need 8.0 (Ampere) or later. {WAY_OUT}"
        )
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    if dtype not in ("bfloat16", "float16"):
        raise ThinkError(
            f"thin KV blocks: the model's dtype is {dtype}; on GPUs use --dtype bfloat16 or "
            f"--dtype float16. {WAY_OUT}"
        )
    head_size = vllm_config.model_config.get_head_size()
    if head_size < CUDA_MIN_HEAD_SIZE:
        raise ThinkError(
            f"thin KV blocks: the model's head size is {head_size}; on GPUs it must be at least "
            f"{CUDA_MIN_HEAD_SIZE}. {WAY_OUT}"
        )
    for present, name, way_out in (
        (
            vllm_config.parallel_config.use_ubatching,
            "microbatching (--enable-dbo, --ubatch-size)",
            "leave it out",
        ),
        (envs.VLLM_BATCH_INVARIANT, "VLLM_BATCH_INVARIANT on GPUs", "unset it"),
    ):
        if present:
            raise ThinkError(
                f"thin KV blocks do not support {name} yet; {way_out}, or serve without {FLAGS}"
            )


def check_guard(vllm_config: VllmConfig) -> None:
    """Refuse a limit on lost score mass where a rank cannot decide alone, and in time.

    Raises:
        ThinkError: Naming the option, the reason and the way out.
    """
    parallel = vllm_config.parallel_config
    for present, name, reason, way_out in (
        (
            not _is_cpu(),
            "on GPUs",
            "the host would have to wait for each prompt's scores, and async scheduling would "
            "schedule a prompt's compaction before they are known",
            "leave it out",
        ),
        (
            parallel.tensor_parallel_size > 1,
            f"with --tensor-parallel-size {parallel.tensor_parallel_size}",
            "each rank knows the scores of its own heads only, and all must decide alike",
            "use 1",
        ),
        (
            parallel.pipeline_parallel_size > 1,
            f"with --pipeline-parallel-size {parallel.pipeline_parallel_size}",
            "each rank knows the scores of its own layers only, and all must decide alike",
            "use 1",
        ),
    ):
        if present:
            raise ThinkError(
                f"--kv-prune-max-loss is not supported {name}: {reason}; {way_out}, or leave "
                "--kv-prune-max-loss out"
            )


def check_windows(vllm_config: VllmConfig) -> None:
    """Refuse sliding-window layers where vLLM cannot keep them apart from the full ones.

    Raises:
        ThinkError: Naming the device or the option, and the way out.
    """
    if not attention_layers(vllm_config.model_config).window:
        return
    if not _is_cpu():
        # vLLM's FlashAttention could serve them, but nobody has seen yet what it does with a
        # block that was thin: see attention/cpu_window.py.
        raise ThinkError(
            f"thin KV blocks do not support {vllm_config.model_config.model} on NVIDIA GPUs "
            "(CUDA): some of its layers have a sliding window, which is supported on CPUs only. "
            f"{WAY_OUT}"
        )
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise ThinkError(
            "thin KV blocks do not support --disable-hybrid-kv-cache-manager with sliding-window "
            "layers, which it would give the blocks of full ones; leave it out, or serve without "
            f"{FLAGS}"
        )


def _say_off(config: ThinkConfig) -> None:
    logger.info(
        "think-vllm: %s prunes no channel of this model, and --kv-quant is none; thin KV "
        "blocks are off",
        prune_flags(config),
    )


def _say(lines: list[str]) -> None:
    """Log the plan, once per start of a server: every API server and engine process has it."""
    is_first = multiprocessing.parent_process() is None
    for line in lines:
        logger.log(logging.INFO if is_first else logging.DEBUG, "think-vllm: %s", line)


def _warn_of_gpus() -> None:
    logger.warning(
        "think-vllm %s: the GPU kernels were tested in an interpreter; no GPU has run them "
        "yet. Compare answers with a server without these flags (docs/gpu.md)",
        __version__,
    )


def _is_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _plain_dtypes(model_config: ModelConfig) -> tuple[str, ...]:
    return ("auto", str(model_config.dtype).removeprefix("torch."))
