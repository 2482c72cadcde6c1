"""What we override or call in vLLM: fails first when an upgrade changes it, and names our file.

Private names and what is wrapped are in the table that ``test_patches.py`` walks. Here: what else
the configuration and the command line rely on. The rest is beside it: attention in ``_cpu`` and
``_cuda``, the block manager in ``_blocks`` and ``_calls``.
"""

import argparse
import inspect

import pytest
import vllm
from vllm import envs, platforms
from vllm.platforms.interface import Platform
from vllm.plugins import DEFAULT_PLUGINS_GROUP
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from tests.support import source
from tests.support.contract import (
    check_accepts,
    check_base,
    check_defaults,
    check_members,
    check_parameters,
    check_source,
    name_of,
    tight,
)
from think_vllm import VLLM_SERIES

REGISTRY = "v1.attention.backends.registry"
MODEL = "config.model:ModelConfig"
ENV_SETUP = "entrypoints.common.startup:cli_env_setup"
ENV_SETUP += " | entrypoints.serve.utils.api_utils:cli_env_setup"


def test_vllm_is_of_the_series_that_we_extend() -> None:
    assert vllm.__version__.startswith(tuple(f"{series}." for series in VLLM_SERIES))


@pytest.mark.parametrize(
    ("ours", "function", "parameters"),
    [
        (
            "hooks/backend.py",
            "v1.attention.backends.registry:register_backend",
            ["backend", "class_path", "is_mamba"],
        ),
        ("activation.py", "config.model:ModelConfig.get_head_size", ["self"]),
        ("activation.py", "config.model:ModelConfig.get_sliding_window", ["self"]),
        (
            "plan/channel_tables.py",
            "config.model:ModelConfig.get_total_num_hidden_layers",
            ["self"],
        ),
        ("plan/channel_tables.py", "config.model:ModelConfig.get_total_num_kv_heads", ["self"]),
        ("plan/channel_tables.py", "config.model:ModelConfig.get_hidden_size", ["self"]),
        ("plan/channel_tables.py", "config.model:ModelConfig.get_vocab_size", ["self"]),
        (
            "hooks/requests.py",
            "exceptions:VLLMValidationError.__init__",
            ["self", "message", "parameter", "value"],
        ),
        ("tools/plan.py", "engine.arg_utils:EngineArgs.create_model_config", ["self"]),
        (
            "tools/plan.py",
            "config.model:ModelConfig.get_num_kv_heads",
            ["self", "parallel_config", "arch_config"],
        ),
        (
            "tools/plan.py",
            "config.model:ModelConfig.get_num_layers",
            ["self", "parallel_config"],
        ),
        (
            "tools/serve.py",
            ENV_SETUP,
            [],
        ),
        ("tools/serve.py", "logger:configure_logging_from_args", ["args"]),
        (
            "tools/serve.py",
            "entrypoints.cli.serve:ServeSubcommand.subparser_init",
            ["self", "subparsers"],
        ),
        ("tools/serve.py", "entrypoints.cli.serve:ServeSubcommand.validate", ["self", "args"]),
        ("tools/serve.py", "entrypoints.cli.serve:ServeSubcommand.cmd", ["args"]),
    ],
    ids=name_of,
)
def test_vllm_signature_is_what_we_rely_on(ours: str, function: str, parameters: list[str]) -> None:
    check_parameters(ours, function, parameters)


def test_vllm_defaults_and_keywords_are_what_we_rely_on() -> None:
    check_defaults(
        "hooks/backend.py", "v1.attention.backends.registry:register_backend", {"is_mamba": False}
    )
    check_defaults(
        "tools/plan.py", "config.model:ModelConfig.get_num_kv_heads", {"arch_config": None}
    )
    check_accepts(
        "tools/plan.py", "engine.arg_utils:EngineArgs", {"model", "dtype", "trust_remote_code"}
    )
    check_accepts("tools/plan.py", "config.parallel:ParallelConfig", {"tensor_parallel_size"})


@pytest.mark.parametrize(
    ("ours", "kind", "names"),
    [
        (
            "hooks/engine_support.py",
            "config.cache:CacheConfig",
            {"cache_dtype", "kv_offloading_size", "kv_sharing_fast_prefill"},
        ),
        (
            "activation.py",
            "config.vllm:VllmConfig",
            {"additional_config", "attention_config", "cache_config", "model_config"}
            | {"parallel_config", "speculative_config", "kv_transfer_config"}
            | {"use_v2_model_runner"},
        ),
        (
            "activation.py",
            "config.model:ModelConfig",
            {"dtype", "hf_text_config", "is_attention_free", "is_encoder_decoder", "is_hybrid"}
            | {"is_mm_prefix_lm", "max_model_len", "model", "model_arch_config", "runner_type"}
            | {"rswa_window", "use_mla"},
        ),
        (
            "hooks/engine_support.py",
            "config.parallel:ParallelConfig",
            {"decode_context_parallel_size", "prefill_context_parallel_size", "use_ubatching"},
        ),
        (
            "hooks/backend.py",
            "v1.attention.backends.registry:AttentionBackendEnum",
            {"CUSTOM", "CPU_ATTN"},
        ),
        (
            "hooks/engine_support.py",
            "platforms.interface:Platform",
            {"is_cpu", "is_cuda", "device_name"},
        ),
        (
            "hooks/engine_support.py",
            "platforms.interface:DeviceCapability",
            {"as_version_str", "to_int"},
        ),
    ],
    ids=name_of,
)
def test_vllm_members_are_what_we_rely_on(ours: str, kind: str, names: set[str]) -> None:
    check_members(ours, kind, names)


@pytest.mark.parametrize(
    ("ours", "kind", "base"),
    [
        (
            "tools/serve.py",
            "engine.arg_utils:AsyncEngineArgs",
            "engine.arg_utils:EngineArgs",
        ),
    ],
    ids=name_of,
)
def test_vllm_base_is_what_we_rely_on(ours: str, kind: str, base: str) -> None:
    check_base(ours, kind, base)


@pytest.mark.parametrize(
    ("ours", "function", "pieces"),
    [
        # Flags get into every parser of engine arguments, after the plugins have been loaded.
        (
            "hooks/platform.py",
            "engine.arg_utils:AsyncEngineArgs.add_cli_args",
            ["load_general_plugins()", "current_platform.pre_register_and_update(parser)"],
        ),
        (
            "hooks/flags.py",
            "utils.argparse_utils:FlexibleArgumentParser.parse_args",
            ["super().parse_args("],
        ),
        # A config is completed by the platform before anyone uses it.
        (
            "hooks/platform.py",
            "config.vllm:VllmConfig.__post_init__",
            ["current_platform.check_and_update_config(self)"],
        ),
        # The choice of a backend depends on what we set, and is cached by it.
        (
            "hooks/backend.py",
            "v1.attention.selector:get_attn_backend",
            [
                "vllm_config = get_current_vllm_config()",
                "backend = attention_config.backend",
                "_cached_get_attn_backend(backend=backend,",
            ],
        ),
        (
            "hooks/backend.py",
            "v1.attention.selector:_cached_get_attn_backend",
            ["get_attn_backend_cls(backend,", "resolve_obj_by_qualname(attention_cls)"],
        ),
        ("tools/serve.py", "entrypoints.cli.serve:ServeSubcommand.cmd", ["args.model_tag"]),
    ],
    ids=name_of,
)
def test_vllm_does_what_we_rely_on(ours: str, function: str, pieces: list[str]) -> None:
    check_source(ours, function, *pieces)


def test_parsers_are_those_of_argparse() -> None:
    assert issubclass(FlexibleArgumentParser, argparse.ArgumentParser), "hooks/flags.py"
    parse = argparse.ArgumentParser.parse_known_args
    assert list(inspect.signature(parse).parameters) == ["self", "args", "namespace"]
    assert "self.parse_known_args(args," in tight(argparse.ArgumentParser.parse_args)


def test_vllm_values_are_what_we_rely_on() -> None:
    assert isinstance(platforms.current_platform, Platform), "hooks/platform.py"
    assert "VLLM_BATCH_INVARIANT" in dir(envs), "hooks/engine_support.py"
    assert "_actions" in vars(FlexibleArgumentParser()), "hooks/flags.py"
    assert AttentionBackendEnum["CUSTOM"] is AttentionBackendEnum.CUSTOM
    assert DEFAULT_PLUGINS_GROUP == "vllm.general_plugins", "pyproject.toml registers there"


def test_vllm_says_which_layers_have_a_window() -> None:
    assert "has_sliding_window" in AttentionSelectorConfig._fields, "hooks/backend.py"
    # How vLLM learns that thin and sliding-window layers need groups of their own.
    uniform = "is_kv_cache_spec_uniform"
    places = f"v1.core.kv_cache_planning:{uniform} | v1.core.kv_cache_utils:{uniform}"
    check_source("hooks/kv_cache_spec.py", places, "except AssertionError")


def test_block_sizes_that_the_user_has_named_stay() -> None:
    # Until 0.32 in the one method, since then in the other. Read: the first is wrapped by us.
    methods = ["check_and_update_config", "update_block_size_for_backend"]
    texts = [source.text(source.find(f"platforms.cpu:CpuPlatform.{name}")) for name in methods]
    asked = [text for text in texts if "ifnotcache_config.user_specified_block_size:" in text]
    assert len(asked) == 1, "hooks/kv_cache.py"
