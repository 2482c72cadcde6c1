"""Reject configurations of an engine that thin blocks do not support, before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from think_vllm.errors import FLAGS, REMEDY, ThinkError
from think_vllm.hooks.model_support import attention_layers, check_model

if TYPE_CHECKING:
    from vllm.config import CacheConfig, ModelConfig, ParallelConfig, VllmConfig

#: Least compute capability of a GPU, and least head size there: what the kernels are made for.
CUDA_CAPABILITY = 80
CUDA_MIN_HEAD_SIZE = 64


def check_engine(vllm_config: VllmConfig) -> None:
    """Reject what is not supported with thin blocks.

    Raises:
        ThinkError: Naming the option or the property of the model, and the remedy.
    """
    check_device(vllm_config)
    check_model(vllm_config.model_config)
    check_windows(vllm_config)
    cache_dtype = vllm_config.cache_config.cache_dtype
    check_cache_dtype(vllm_config.model_config, cache_dtype, vllm_config.quant_config)
    for name, reason in unsupported_options(vllm_config):
        raise ThinkError(
            f"thin KV blocks do not support {name} yet: {reason}; leave it out, or serve without "
            f"{FLAGS}"
        )
    events = vllm_config.kv_events_config
    if events is not None and events.enable_kv_cache_events:
        raise ThinkError(
            "thin KV blocks do not support --kv-events-config yet: blocks change their form "
            f"without an event; leave it out, or serve without {FLAGS}"
        )


def unsupported_options(vllm_config: VllmConfig) -> list[tuple[str, str]]:
    """Options of a config that work with dense blocks alone, and why."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    decode, prefill = parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size
    rolls_back = (
        "a rejected token rolls its request back, and thin blocks cannot become dense again"
    )
    cuts = "it cuts spans into pieces on several ranks"
    moves = "it moves dense blocks and knows nothing of channel tables"
    options: list[tuple[Any, str, str]] = [
        (vllm_config.speculative_config, "--speculative-config", rolls_back),
        (
            vllm_config.kv_transfer_config,
            "--kv-transfer-config (a KV connector)",
            "connectors move dense blocks and know nothing of channel tables",
        ),
        # vLLM turns this into a KV connector only later.
        (cache.kv_offloading_size, "--kv-offloading-size", moves),
        (decode > 1, f"--decode-context-parallel-size {decode}", cuts),
        (prefill > 1, f"--prefill-context-parallel-size {prefill}", cuts),
        (
            cache.kv_sharing_fast_prefill,
            "--kv-sharing-fast-prefill",
            "queries that select channels would be left out",
        ),
    ]
    return [(name, reason) for present, name, reason in options if present]


def check_cache_dtype(model_config: ModelConfig, requested: str, quant_config: Any = None) -> None:
    """Reject a quantized KV cache of vLLM's own, requested by the user or the checkpoint.

    Args:
        model_config: vLLM's, of the model.
        requested: ``--kv-cache-dtype``.
        quant_config: What vLLM has made of the checkpoint's quantization config, if it has.

    Raises:
        ThinkError: Naming the option or the checkpoint, and the remedy.
    """
    dtype = str(model_config.dtype).removeprefix("torch.")
    why = "blocks that are dense hold keys and values as computed"
    declared = checkpoint_cache_dtype(model_config, quant_config)
    # What a user names goes before what the checkpoint says.
    if declared and (requested == "auto" or requested not in plain_dtypes(model_config)):
        remedy = f"give --kv-cache-dtype {dtype}"
        if dtype not in ("bfloat16", "float16"):  # vLLM has no such value
            remedy = "give --dtype bfloat16 --kv-cache-dtype bfloat16"
        raise ThinkError(
            f"thin KV blocks do not support the KV cache type that the checkpoint "
            f"{model_config.model} sets ({declared} in its quantization config): {why}; "
            f"{remedy}, which leaves the rest of its quantization as it is, or serve without "
            f"{FLAGS}"
        )
    if requested not in plain_dtypes(model_config):
        remedy = "use --kv-quant fp8 instead" if requested.startswith("fp8") else "use auto"
        raise ThinkError(
            f"thin KV blocks do not support --kv-cache-dtype {requested} yet: {why}; {remedy}, or "
            f"serve without {FLAGS}"
        )


#: Where the formats of checkpoints (compressed-tensors, ModelOpt, Quark, fp8) say how keys and
#: values are to be kept.
_CACHE_KEYS = ("kv_cache_scheme", "kv_cache_quant_algo", "kv_cache_dtype", "kv_cache_quant_config")


def checkpoint_cache_dtype(model_config: ModelConfig, quant_config: Any = None) -> str:
    """What a checkpoint sets for the KV cache, as ``key=value``; empty if nothing.

    A cache type of "auto" may become fp8 after this: vLLM's layers follow what a checkpoint says.
    """
    declared = [
        getattr(config, name, None)
        for config in (model_config.hf_config, model_config.hf_text_config)
        for name in ("quantization_config", "compression_config")
    ]
    for config in filter(None, declared):
        outer = config if isinstance(config, Mapping) else config.to_dict()
        # ModelOpt has its settings one level deeper.
        inner = outer.get("quantization")
        for settings in (outer, inner if isinstance(inner, Mapping) else {}):
            for key in _CACHE_KEYS:
                value = settings.get(key)
                dtype = str(value).lower().removeprefix("torch.")
                if value and dtype not in (*plain_dtypes(model_config), "none"):
                    return f"{key}={value}"
    scheme = getattr(quant_config, "kv_cache_scheme", None)
    return f"kv_cache_scheme={scheme}" if scheme else ""


def check_device(vllm_config: VllmConfig) -> None:
    """Reject devices without kernels, and what the others do not support.

    Raises:
        ThinkError: Naming the device or the option, and the remedy.
    """
    from vllm import envs
    from vllm.platforms import current_platform

    if is_cpu():
        if vllm_config.use_v2_model_runner:
            raise ThinkError(
                "thin KV blocks do not support vLLM's model runner V2 on CPUs yet; set "
                f"VLLM_USE_V2_MODEL_RUNNER=0, or serve without {FLAGS}"
            )
        return
    if not current_platform.is_cuda():
        raise ThinkError(
            "thin KV blocks: there are kernels for CPUs and for NVIDIA GPUs, the device is "
            f"{current_platform.device_name}. {REMEDY}"
        )
    if not current_platform.has_device_capability(CUDA_CAPABILITY):
        capability = current_platform.get_device_capability()
        raise ThinkError(
            f"thin KV blocks: the GPU has compute capability {capability.as_version_str()}; the "
            f"kernels need 8.0 (Ampere) or later. {REMEDY}"
        )
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    if dtype not in ("bfloat16", "float16"):
        raise ThinkError(
            f"thin KV blocks: the model's dtype is {dtype}; on GPUs use --dtype bfloat16 or "
            f"--dtype float16. {REMEDY}"
        )
    head_size = vllm_config.model_config.get_head_size()
    if head_size < CUDA_MIN_HEAD_SIZE:
        raise ThinkError(
            f"thin KV blocks: the model's head size is {head_size}; on GPUs it must be at least "
            f"{CUDA_MIN_HEAD_SIZE}. {REMEDY}"
        )
    for present, name, remedy in (
        (
            vllm_config.parallel_config.use_ubatching,
            "microbatching (--enable-dbo, --ubatch-size)",
            "leave it out",
        ),
        (envs.VLLM_BATCH_INVARIANT, "VLLM_BATCH_INVARIANT on GPUs", "unset it"),
    ):
        if present:
            raise ThinkError(
                f"thin KV blocks do not support {name} yet; {remedy}, or serve without {FLAGS}"
            )


def check_loss_limit(parallel: ParallelConfig) -> None:
    """Reject a limit on lost score mass where a rank cannot decide alone, and in time.

    Raises:
        ThinkError: Naming the option, the reason and the remedy.
    """
    for present, name, reason, remedy in (
        (
            not is_cpu(),
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
                f"--kv-prune-max-loss is not supported {name}: {reason}; {remedy}, or leave "
                "--kv-prune-max-loss out"
            )


def check_windows(vllm_config: VllmConfig) -> None:
    """Reject sliding-window layers where vLLM cannot keep them apart from the full ones.

    Raises:
        ThinkError: Naming the device or the option, and the remedy.
    """
    if not attention_layers(vllm_config.model_config).window:
        return
    if not is_cpu():
        # vLLM's FlashAttention could serve them, but is untested on blocks that were thin: see
        # worker/cpu/window.py.
        raise ThinkError(
            f"thin KV blocks do not support {vllm_config.model_config.model} on NVIDIA GPUs "
            "(CUDA): some of its layers have a sliding window, which is supported on CPUs only. "
            f"{REMEDY}"
        )
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise ThinkError(
            "thin KV blocks do not support --disable-hybrid-kv-cache-manager with sliding-window "
            "layers, which it would give the blocks of full ones; leave it out, or serve without "
            f"{FLAGS}"
        )


def is_cpu() -> bool:
    """Whether vLLM runs on CPUs."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def plain_dtypes(model_config: ModelConfig) -> tuple[str, ...]:
    """Values of ``--kv-cache-dtype`` that leave keys and values of a model as computed."""
    return ("auto", str(model_config.dtype).removeprefix("torch."))


def requested_block_size(cache_config: CacheConfig) -> int | None:
    """``--block-size``, None if it was left out."""
    return cache_config.block_size if cache_config.user_specified_block_size else None
