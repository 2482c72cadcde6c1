"""Settings: every wrong one is refused in words."""

import pytest

from think_vllm.config import ThinkConfig, config_from_additional, parse_config
from think_vllm.errors import ThinkError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_channel_prune": 0.81}, "--kv-channel-prune is 0.81: .*less than or equal to 0.8"),
        ({"kv_channel_prune": -0.1}, "--kv-channel-prune is -0.1: .*greater than or equal to 0"),
        ({"kv_channel_prune": "half"}, "--kv-channel-prune is 'half'"),
        ({"kv_recent_window": -1}, "--kv-recent-window is -1"),
        ({"kv_observation_window": 0}, "--kv-observation-window is 0"),
        ({"kv_chanel_prune": 0.5}, "unknown setting kv_chanel_prune=0.5; known are kv_channel"),
    ],
)
def test_parse_config_names_what_is_wrong(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ThinkError, match=message):
        parse_config(settings)


def test_parse_config_names_every_wrong_setting() -> None:
    with pytest.raises(ThinkError, match=r"--kv-channel-prune.*; --kv-recent-window"):
        parse_config({"kv_channel_prune": 2, "kv_recent_window": -3})


@pytest.mark.parametrize("additional", [None, {}, {"other": 1}, {"think": {}}, object()])
def test_config_from_additional_is_none_when_pruning_is_not_asked_for(additional: object) -> None:
    assert config_from_additional(additional) is None


def test_config_from_additional_is_none_at_ratio_zero() -> None:
    assert config_from_additional({"think": {"kv_channel_prune": 0}}) is None


def test_config_from_additional_reads_settings() -> None:
    config = config_from_additional({"think": {"kv_channel_prune": 0.4, "kv_recent_window": 64}})
    assert config == ThinkConfig(kv_channel_prune=0.4, kv_recent_window=64)


def test_config_from_additional_refuses_another_shape() -> None:
    with pytest.raises(ThinkError, match="must be an object"):
        config_from_additional({"think": 0.5})
