"""What we override or call in vLLM: fails first when an upgrade changes it, and names our file.

What we rely on is the table ``vllm_contract.txt``. Private names and what is wrapped are in the
table that ``test_patches.py`` walks. Beside this file: what calls of vLLM's do, and in which order.
"""

import argparse
import inspect
from pathlib import Path

import pytest
import vllm
from vllm import envs, platforms
from vllm.platforms.interface import Platform
from vllm.plugins import DEFAULT_PLUGINS_GROUP
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backend import AttentionType, MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import KVCacheLayout

from tests.conftest import REPOSITORY
from tests.support import source
from tests.support.contract import check, rows, tight
from think_vllm import VLLM_SERIES

TABLE = Path(__file__).with_name("vllm_contract.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(("ours", "use", "pieces"), rows(TABLE))
def test_vllm_is_what_we_rely_on(ours: str, use: str, pieces: list[str]) -> None:
    assert (REPOSITORY / "think_vllm" / ours).is_file()
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
    assert CPUAttentionBackend.supported_kv_cache_layouts() == (KVCacheLayout.LBHNC,), "layout.py"
    assert AttentionType.DECODER == "decoder", "worker/cpu/layer.py and worker/cuda/layer.py"
    assert MultipleOf(16).base == 16, "worker/cpu/backend.py"
    # Keys and values are stored before attention, by an operator of its own: worker/cpu/layer.py.
    assert CPUAttentionBackend.forward_includes_kv_cache_update is False


def test_block_sizes_that_the_user_has_named_stay() -> None:
    # Until 0.32 in the one method, since then in the other. Read: the first is wrapped by us.
    methods = ["check_and_update_config", "update_block_size_for_backend"]
    texts = [source.text(source.find(f"platforms.cpu:CpuPlatform.{name}")) for name in methods]
    asked = [text for text in texts if "ifnotcache_config.user_specified_block_size:" in text]
    assert len(asked) == 1, "hooks/kv_cache.py"
