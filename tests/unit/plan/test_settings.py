"""Settings: every wrong one is rejected in words."""

from typing import get_args

import pytest

from think_vllm.errors import ThinkError
from think_vllm.plan.additional_config import config_from_additional
from think_vllm.plan.formats import FORMATS, GROUP_SIZES
from think_vllm.plan.parsing import parse_config
from think_vllm.plan.settings import ThinkConfig

KEYS: dict[str, object] = {"kv_channel_prune": 0.5}
VALUES: dict[str, object] = {"kv_value_prune": 0.3}
FP8: dict[str, object] = {"kv_quant": "fp8"}
LOSS = KEYS | {"kv_prune_max_loss": 0.2}
STATIC: dict[str, object] = {"kv_select": "static", "kv_channel_tables_file": "t.json"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_channel_prune": 0.81}, "--kv-channel-prune is 0.81: .*less than or equal to 0.8"),
        ({"kv_channel_prune": -0.1}, "--kv-channel-prune is -0.1: .*greater than or equal to 0"),
        ({"kv_channel_prune": "half"}, "--kv-channel-prune is 'half'"),
        ({"kv_value_prune": 0.9}, "--kv-value-prune is 0.9: .*less than or equal to 0.8"),
        ({"kv_recent_window": -1}, "--kv-recent-window is -1"),
        ({"kv_observation_window": 0}, "--kv-observation-window is 0"),
        ({"kv_quant": "int8"}, "--kv-quant is 'int8': Input should be 'none', 'fp8', 'kivi4'"),
        ({"kv_quant": "kivi4", "kv_quant_group": 48}, "--kv-quant-group is 48: .* 32, 64 or 128"),
        ({"kv_recent_window": 64}, "--kv-recent-window given without --kv-channel-prune RATIO or"),
        (
            {"kv_quant_group": 64, "kv_prune_decode": False},
            "group, --kv-prune-decode given without",
        ),
        (FP8 | {"kv_quant_group": 32}, "-group is 32, but --kv-quant is fp8, .* use .* kivi4 or"),
        (
            FP8 | {"kv_prune_prefill": True, "kv_prefix_cache": "dense"},
            "no exact prefixes for --kv-prefix-cache dense to keep; leave one of them out",
        ),
        (
            FP8 | {"kv_prune_prefill": True, "kv_prune_decode": False},
            "with --no-kv-prune-decode what they generate stays dense; leave one of them out",
        ),
        (
            KEYS | {"kv_quant_group": 64},
            "--kv-quant is none, which has no groups; leave --kv-quant",
        ),
        (
            KEYS | {"kv_select": "best"},
            "--kv-select is 'best': Input should be 'think', 'key-norm'",
        ),
        (KEYS | {"kv_channel_tables": "block"}, "tables is 'block': Input should be 'prompt' or"),
        ({"kv_select": "random"}, "--kv-select given without --kv-channel-prune RATIO"),
        (
            FP8 | {"kv_select": "key-norm", "kv_channel_tables": "span"},
            "--kv-select key-norm, --kv-channel-tables span given, but no channels are pruned",
        ),
        (VALUES | {"kv_select": "key-norm"}, "chooses key channels, and only value channels are"),
        (VALUES | {"kv_channel_tables": "span"}, "about key channels, and only value channels are"),
        (
            KEYS | {"kv_select": "random", "kv_channel_tables": "span"},
            "--kv-select random looks at no keys, .* leave one of them out",
        ),
        (
            KEYS | {"kv_evict": "snapkv", "kv_channel_tables": "span"},
            "--kv-evict snapkv repacks .* leave it or --kv-channel-tables span out",
        ),
        ({"kv_evict": "streaming"}, "--kv-evict is 'streaming': Input should be 'none', 'snapkv'"),
        ({"kv_evict": "snapkv", "kv_evict_budget": 0}, "-budget is 0: .*than or equal to 1"),
        (FP8 | {"kv_evict_budget": 512}, "is 512, but nothing is evicted; give --kv-evict snapkv"),
        ({"kv_evict_budget": 512}, "--kv-evict-budget given without"),
        (KEYS | {"kv_prune_max_loss": 0}, "--kv-prune-max-loss is 0: .*greater than 0"),
        (
            FP8 | {"kv_prune_max_loss": 0.2},
            "0.2 limits .* none are pruned; give --kv-channel-prune",
        ),
        (LOSS | {"kv_select": "random"}, "which --kv-select random does not have; leave one of"),
        (LOSS | {"kv_channel_tables": "span"}, "--kv-channel-tables span does not have; leave one"),
        (LOSS | {"kv_evict": "h2o"}, "with --kv-evict h2o that is too early to know; leave one of"),
        (LOSS | {"kv_prune_prefill": True}, "with --kv-prune-prefill that is too late to know"),
        (LOSS | {"kv_prefix_cache": "thin"}, "as --kv-prefix-cache dense does; use that"),
        (KEYS | {"kv_select": "static"}, "needs --kv-channel-tables-file PATH; make one with `th"),
        (
            KEYS | {"kv_channel_tables_file": "t.json"},
            "--kv-channel-tables-file is t.json, but --kv-select is think, which reads no tables",
        ),
        (
            STATIC | KEYS | {"kv_quant": "kivi4"},
            "kivi4 quantizes groups of them; use --kv-quant fp8",
        ),
        (STATIC | KEYS | {"kv_evict": "snapkv"}, "static has none; leave one"),
        (
            STATIC | KEYS | {"kv_recent_window": 32, "kv_prune_decode": False},
            "--kv-recent-window, --kv-prune-decode given with --kv-select static, where every",
        ),
        (STATIC | VALUES | {"kv_prefix_cache": "dense"}, "cache given with --kv-select static"),
        (STATIC, "--kv-select, --kv-channel-tables-file given without --kv-channel-prune RATIO"),
        (
            KEYS | {"kv_evict": "h2o", "kv_prune_prefill": True},
            "--kv-evict h2o chooses tokens once a prompt has ended, --kv-prune-prefill compacts",
        ),
        ({"kv_evict": "snapkv", "kv_prefix_cache": "thin"}, "keeps .* use --kv-prefix-cache dense"),
        ({"kv_chanel_prune": 0.5}, "unknown setting kv_chanel_prune=0.5; known are kv_channel"),
        ({"kv_channel_prune": 2, "kv_recent_window": -3}, "--kv-channel-prune.*; --kv-recent-wind"),
    ],
)
def test_parse_config_names_what_is_wrong(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ThinkError, match=message):
        parse_config(settings)


@pytest.mark.parametrize(
    "additional",
    [
        *(None, {}, {"other": 1}, {"think": {}}, object(), {"think": {"kv_channel_prune": 0}}),
        {"think": {"kv_channel_prune": 0, "kv_quant": "none", "kv_recent_window": 64}},
    ],
)
def test_config_from_additional_is_none_when_thin_blocks_are_not_asked_for(additional):
    assert config_from_additional(additional) is None


def test_config_from_additional_reads_a_format_without_a_ratio() -> None:
    config = config_from_additional({"think": {"kv_quant": "k4v2", "kv_quant_group": 64}})
    assert config is not None
    assert (config.format, config.kv_quant_group) == (FORMATS["k4v2"], 64)
    assert config.kv_channel_prune == 0.0


def test_parse_config_takes_what_it_gave() -> None:
    # The flags travel to every process this way, and each of them checks them again.
    for settings in (
        {"kv_quant": "fp8"},
        {"kv_channel_prune": 0.5},
        {"kv_quant": "kivi2"},
        {"kv_evict": "h2o"},
        {"kv_evict": "snapkv", "kv_evict_budget": 300, "kv_prefix_cache": "dense"},
        {"kv_channel_prune": 0.5, "kv_prune_max_loss": 0.2},
    ):
        config = parse_config(settings)
        assert parse_config(config.model_dump(exclude_unset=True)) == config


def test_settings_name_every_format_and_group() -> None:
    fields = ThinkConfig.model_fields
    assert get_args(fields["kv_quant"].annotation) == tuple(FORMATS)
    assert get_args(fields["kv_quant_group"].annotation) == GROUP_SIZES


def test_config_from_additional_reads_settings() -> None:
    config = config_from_additional({"think": {"kv_channel_prune": 0.4, "kv_recent_window": 64}})
    assert config == ThinkConfig(kv_channel_prune=0.4, kv_recent_window=64)


def test_config_from_additional_rejects_another_shape() -> None:
    with pytest.raises(ThinkError, match="must be an object"):
        config_from_additional({"think": 0.5})
