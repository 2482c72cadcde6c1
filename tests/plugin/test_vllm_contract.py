"""What we override or call in vLLM: fails first when an upgrade changes it, and says who relies on.

Here: the plugin's hooks, the configuration and the command line. The rest is beside it: attention
in ``_cpu`` and ``_cuda``, the block manager in ``_blocks`` and ``_calls``.
"""

import argparse
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import vllm
from vllm import envs, platforms
from vllm.config import CacheConfig, ModelConfig, ParallelConfig, VllmConfig, attention
from vllm.config.model_arch import ModelArchitectureConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.serve.utils import api_utils
from vllm.exceptions import VLLMValidationError
from vllm.logger import configure_logging_from_args
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import DeviceCapability, Platform
from vllm.plugins import DEFAULT_PLUGINS_GROUP
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.core.kv_cache_utils import is_kv_cache_spec_uniform
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.worker import gpu_model_runner

from tests.support.contract import (
    check_accepts,
    check_defaults,
    check_members,
    check_parameters,
    check_source,
    name_of,
)
from think_vllm import VLLM_SERIES


def test_vllm_is_of_the_series_that_we_extend() -> None:
    assert vllm.__version__.startswith(VLLM_SERIES + ".")


@pytest.mark.parametrize(
    ("ours", "function", "parameters"),
    [
        ("compat.py", Platform.pre_register_and_update, ["parser"]),
        ("compat.py", Platform.check_and_update_config, ["vllm_config"]),
        (
            "compat.py",
            Platform.get_attn_backend_cls,
            ["selected_backend", "attn_selector_config", "num_heads"],
        ),
        ("compat.py", register_backend, ["backend", "class_path", "is_mamba"]),
        ("compat.py", argparse.ArgumentParser.parse_known_args, ["self", "args", "namespace"]),
        ("compat.py", FlexibleArgumentParser.parse_known_args, ["self", "args", "namespace"]),
        ("activation.py", ModelConfig.get_head_size, ["self"]),
        ("activation.py", ModelConfig.get_sliding_window, ["self"]),
        ("static/tables.py", ModelConfig.get_total_num_hidden_layers, ["self"]),
        ("static/tables.py", ModelConfig.get_total_num_kv_heads, ["self"]),
        ("static/tables.py", ModelConfig.get_hidden_size, ["self"]),
        ("static/tables.py", ModelConfig.get_vocab_size, ["self"]),
        (
            "compat_requests.py",
            InputProcessor.process_inputs,
            [
                *["self", "request_id", "prompt", "params", "supported_tasks", "arrival_time"],
                *["lora_request", "tokenization_kwargs", "trace_headers", "priority"],
                *["data_parallel_rank", "resumable", "session_id", "kv_hints"],
            ],
        ),
        (
            "compat_requests.py",
            VLLMValidationError.__init__,
            ["self", "message", "parameter", "value"],
        ),
        ("cli/plan.py", EngineArgs.create_model_config, ["self"]),
        (
            "cli/plan.py",
            ModelConfig.get_num_kv_heads,
            ["self", "parallel_config", "arch_config"],
        ),
        ("cli/plan.py", ModelConfig.get_num_layers, ["self", "parallel_config"]),
        ("cli/serve.py", api_utils.cli_env_setup, []),
        ("cli/serve.py", configure_logging_from_args, ["args"]),
        ("cli/serve.py", ServeSubcommand.subparser_init, ["self", "subparsers"]),
        ("cli/serve.py", ServeSubcommand.validate, ["self", "args"]),
        ("cli/serve.py", ServeSubcommand.cmd, ["args"]),
    ],
    ids=name_of,
)
def test_vllm_signature_is_what_we_rely_on(
    ours: str, function: Callable[..., Any], parameters: list[str]
) -> None:
    check_parameters(ours, function, parameters)


def test_vllm_defaults_and_keywords_are_what_we_rely_on() -> None:
    check_defaults("compat.py", register_backend, {"is_mamba": False})
    check_defaults("cli/plan.py", ModelConfig.get_num_kv_heads, {"arch_config": None})
    check_accepts("cli/plan.py", EngineArgs, {"model", "dtype", "trust_remote_code"})
    check_accepts("cli/plan.py", ParallelConfig, {"tensor_parallel_size"})


@pytest.mark.parametrize(
    ("ours", "kind", "names"),
    [
        (
            "engine_checks.py",
            CacheConfig,
            {"block_size", "user_specified_block_size", "enable_prefix_caching", "cache_dtype"}
            | {"kv_offloading_size", "kv_sharing_fast_prefill"},
        ),
        (
            "activation.py",
            VllmConfig,
            {"additional_config", "attention_config", "cache_config", "model_config"}
            | {"parallel_config", "speculative_config", "kv_transfer_config"}
            | {"use_v2_model_runner"},
        ),
        (
            "activation.py",
            ModelConfig,
            {"dtype", "hf_text_config", "is_attention_free", "is_encoder_decoder", "is_hybrid"}
            | {"is_mm_prefix_lm", "max_model_len", "model", "model_arch_config", "runner_type"}
            | {"rswa_window", "use_mla"},
        ),
        (
            "engine_checks.py",
            ParallelConfig,
            {"decode_context_parallel_size", "prefill_context_parallel_size", "use_ubatching"},
        ),
        ("compat.py", ModelArchitectureConfig, {"rswa_window"}),
        ("compat.py", attention.AttentionConfig, {"backend", "backend_per_kind"}),
        ("compat.py", AttentionBackendEnum, {"CUSTOM", "CPU_ATTN"}),
        ("engine_checks.py", Platform, {"is_cpu", "is_cuda", "device_name"}),
        ("engine_checks.py", DeviceCapability, {"as_version_str", "to_int"}),
    ],
    ids=name_of,
)
def test_vllm_members_are_what_we_rely_on(ours: str, kind: type, names: set[str]) -> None:
    check_members(ours, kind, names)


@pytest.mark.parametrize(
    ("ours", "kind", "base"),
    [
        ("cli/flags.py", FlexibleArgumentParser, argparse.ArgumentParser),
        ("cli/serve.py", AsyncEngineArgs, EngineArgs),
    ],
    ids=name_of,
)
def test_vllm_base_is_what_we_rely_on(ours: str, kind: type, base: type) -> None:
    assert issubclass(kind, base), f"{kind} is no {base} any more, {ours} relies on it"


@pytest.mark.parametrize(
    ("ours", "function", "pieces"),
    [
        # Flags get into every parser of engine arguments, after the plugins have been loaded.
        (
            "compat.py",
            AsyncEngineArgs.add_cli_args,
            ["load_general_plugins()", "current_platform.pre_register_and_update(parser)"],
        ),
        ("compat.py", FlexibleArgumentParser.parse_args, ["super().parse_args("]),
        ("compat.py", argparse.ArgumentParser.parse_args, ["self.parse_known_args(args,"]),
        # A config is completed by the platform before anyone uses it.
        (
            "compat.py",
            VllmConfig.__post_init__,
            ["current_platform.check_and_update_config(self)"],
        ),
        # A block size that the user has named stays.
        (
            "compat.py",
            CpuPlatform.check_and_update_config,
            ["elif not cache_config.user_specified_block_size:"],
        ),
        # The choice of a backend depends on what we set, and is cached by it.
        (
            "compat.py",
            selector.get_attn_backend,
            [
                "vllm_config = get_current_vllm_config()",
                "backend = attention_config.backend",
                "_cached_get_attn_backend(backend=backend,",
            ],
        ),
        (
            "compat.py",
            selector._cached_get_attn_backend.__wrapped__,
            ["get_attn_backend_cls(backend,", "resolve_obj_by_qualname(attention_cls)"],
        ),
        # Prompt lengths come with every step once there is a window.
        (
            "compat.py",
            gpu_model_runner.GPUModelRunner._build_attention_metadata,
            [
                "if self.model_config.rswa_window is not None:",
                "rswa_prefix_lens = num_prompt_tokens_cpu",
                "rswa_prefix_lens=rswa_prefix_lens",
            ],
        ),
        ("cli/serve.py", ServeSubcommand.cmd, ["args.model_tag"]),
    ],
    ids=name_of,
)
def test_vllm_does_what_we_rely_on(ours: str, function: Any, pieces: list[str]) -> None:
    check_source(ours, function, *pieces)


def test_vllm_values_are_what_we_rely_on() -> None:
    assert isinstance(platforms.current_platform, Platform), "compat.py"
    assert "VLLM_BATCH_INVARIANT" in dir(envs), "engine_checks.py"
    assert "_actions" in vars(FlexibleArgumentParser()), "cli/flags.py"
    assert AttentionBackendEnum["CUSTOM"] is AttentionBackendEnum.CUSTOM
    assert DEFAULT_PLUGINS_GROUP == "vllm.general_plugins", "pyproject.toml registers there"
    for name in ("pre_register_and_update", "check_and_update_config", "get_attn_backend_cls"):
        declared = inspect.getattr_static(Platform, name)
        assert isinstance(declared, classmethod), f"compat.py replaces {name} by a class method"


def test_vllm_says_which_layers_have_a_window() -> None:
    assert "has_sliding_window" in AttentionSelectorConfig._fields, "compat.py"
    # How vLLM learns that thin and sliding-window layers need groups of their own.
    check_source("blocks/spec.py", is_kv_cache_spec_uniform, "except AssertionError")
