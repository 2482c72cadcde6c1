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
from tests.support.contract import check, rows, tight
from think_vllm import VLLM_SERIES

TABLE = """
hooks/backend.py
    v1.attention.backends.registry:register_backend(backend, class_path, is_mamba=False)
    v1.attention.backends.registry:AttentionBackendEnum{CPU_ATTN, CUSTOM}
    # The choice of a backend depends on what we set, and is cached by it.
    v1.attention.selector:get_attn_backend
        vllm_config = get_current_vllm_config()
        backend = attention_config.backend
        _cached_get_attn_backend(backend=backend,
    v1.attention.selector:_cached_get_attn_backend
        get_attn_backend_cls(backend,
        resolve_obj_by_qualname(attention_cls)
hooks/activation.py
    config.vllm:VllmConfig{additional_config, attention_config, cache_config, kv_transfer_config, \
        model_config, parallel_config, speculative_config, use_v2_model_runner}
    config.model:ModelConfig{dtype, hf_text_config, is_attention_free, is_encoder_decoder, \
        is_hybrid, is_mm_prefix_lm, max_model_len, model, model_arch_config, rswa_window, \
        runner_type, use_mla}
    .get_head_size(self)
    .get_sliding_window(self)
plan/channel_tables.py
    config.model:ModelConfig.get_total_num_hidden_layers(self)
    .get_total_num_kv_heads(self)
    .get_hidden_size(self)
    .get_vocab_size(self)
hooks/requests.py
    exceptions:VLLMValidationError.__init__(self, message, parameter, value)
tools/plan.py
    engine.arg_utils:EngineArgs(..., model, dtype, trust_remote_code)
    .create_model_config(self)
    config.parallel:ParallelConfig(..., tensor_parallel_size)
    config.model:ModelConfig.get_num_kv_heads(self, parallel_config, arch_config=None)
    .get_num_layers(self, parallel_config)
tools/serve.py
    entrypoints.common.startup:cli_env_setup | entrypoints.serve.utils.api_utils:cli_env_setup()
    logger:configure_logging_from_args(args)
    engine.arg_utils:AsyncEngineArgs extends engine.arg_utils:EngineArgs
    entrypoints.cli.serve:ServeSubcommand.subparser_init(self, subparsers)
    .validate(self, args)
    .cmd(args)
    .cmd
        args.model_tag
hooks/engine_support.py
    config.cache:CacheConfig{cache_dtype, kv_offloading_size, kv_sharing_fast_prefill}
    config.parallel:ParallelConfig{decode_context_parallel_size, prefill_context_parallel_size, \
        use_ubatching}
    platforms.interface:Platform{device_name, is_cpu, is_cuda}
    .has_device_capability(capability, device_id)
    .get_device_capability(device_id)
    platforms.interface:DeviceCapability{as_version_str, to_int}
hooks/platform.py
    # Flags get into every parser of engine arguments, after the plugins have been loaded.
    engine.arg_utils:AsyncEngineArgs.add_cli_args
        load_general_plugins()
        current_platform.pre_register_and_update(parser)
    # A config is completed by the platform before anyone uses it.
    config.vllm:VllmConfig.__post_init__
        current_platform.check_and_update_config(self)
hooks/flags.py
    utils.argparse_utils:FlexibleArgumentParser.parse_args
        super().parse_args(
hooks/kv_cache_spec.py
    # How vLLM learns that thin and sliding-window layers need groups of their own.
    v1.core.kv_cache_planning:is_kv_cache_spec_uniform | \
        v1.core.kv_cache_utils:is_kv_cache_spec_uniform
        except AssertionError
"""


@pytest.mark.parametrize(("ours", "use", "pieces"), rows(TABLE))
def test_vllm_is_what_we_rely_on(ours: str, use: str, pieces: list[str]) -> None:
    check(ours, use, pieces)


def test_vllm_is_of_the_series_that_we_extend() -> None:
    assert vllm.__version__.startswith(tuple(f"{series}." for series in VLLM_SERIES))


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
    assert "has_sliding_window" in AttentionSelectorConfig._fields, "hooks/backend.py"


def test_block_sizes_that_the_user_has_named_stay() -> None:
    # Until 0.32 in the one method, since then in the other. Read: the first is wrapped by us.
    methods = ["check_and_update_config", "update_block_size_for_backend"]
    texts = [source.text(source.find(f"platforms.cpu:CpuPlatform.{name}")) for name in methods]
    asked = [text for text in texts if "ifnotcache_config.user_specified_block_size:" in text]
    assert len(asked) == 1, "hooks/kv_cache.py"
