"""Find our settings in vLLM's ``additional_config``, and say where they were put wrong."""

import difflib
from collections.abc import Mapping
from typing import Any

from think_vllm.errors import ThinkError
from think_vllm.plan.parsing import parse_config
from think_vllm.plan.settings import ADDITIONAL_CONFIG_KEY, ThinkConfig, flag_name

#: What else people may write for the key of our settings, letters alone.
_NEAR_KEYS = ("think", "thinkvllm", "vllmthink", "thinkkv", "kvthink")
#: How like one of these, or a setting, a key must be to be taken for it.
_NEARNESS = 0.85


def config_from_additional(additional_config: object) -> ThinkConfig | None:
    """Read our settings out of vLLM's ``additional_config``.

    Returns:
        None if there are none, or if they ask for nothing: vLLM then runs untouched.

    Raises:
        ThinkError: If they are there but wrong.
    """
    if not isinstance(additional_config, Mapping):
        return None
    settings = settings_of(additional_config)
    if settings is None:
        return None
    config = parse_config(settings)
    return config if config.enabled else None


def settings_of(additional_config: Mapping[Any, Any]) -> Mapping[str, Any] | None:
    """Our settings in vLLM's ``additional_config``; None if there are none.

    Raises:
        ThinkError: If they are no object, or look like ours and stand elsewhere.
    """
    check_place(additional_config)
    settings = additional_config.get(ADDITIONAL_CONFIG_KEY)
    if settings is not None and not isinstance(settings, Mapping):
        raise ThinkError(
            f'additional_config["{ADDITIONAL_CONFIG_KEY}"] is {settings!r}; it must be an object '
            'like {"kv_channel_prune": 0.5}'
        )
    return settings


def check_place(additional_config: Mapping[Any, Any]) -> None:
    """Reject settings that look like ours where they are not read.

    Raises:
        ThinkError: Naming the key, and the right form.
    """
    for key, value in additional_config.items():
        if key == ADDITIONAL_CONFIG_KEY:
            continue
        is_near = _is_near(str(key))
        at_top = _nearest(key)
        nested = at_top or _find_ours(value)
        # Below another key, names such as `kv_quant` may be settings of the plugin whose key it is.
        if is_near or at_top or "prune" in nested or "channel" in nested:
            setting = nested or "kv_channel_prune"
            raise ThinkError(
                f"additional_config has {key!r}, which is not read; settings of think-vllm belong "
                f'below "{ADDITIONAL_CONFIG_KEY}": write {{"{ADDITIONAL_CONFIG_KEY}": '
                f'{{"{setting}": ...}}}}, or give {flag_name(setting)}'
            )


def _find_ours(value: Any) -> str:
    """The first of our settings in what another key holds; empty if there is none."""
    if isinstance(value, Mapping):
        for name in value:
            setting = _as_setting(name)
            if setting in ThinkConfig.model_fields:
                return setting
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return ""
    return next(filter(None, map(_find_ours, value)), "")


def _nearest(key: Any) -> str:
    """The setting that a key is or was meant to be; empty if it is like none."""
    names = ThinkConfig.model_fields
    return next(iter(difflib.get_close_matches(_as_setting(key), names, 1, _NEARNESS)), "")


def _as_setting(name: Any) -> str:
    """A flag or a key in the form that settings have."""
    return str(name).lstrip("-").replace("-", "_").lower()


def _is_near(key: str) -> bool:
    """Whether a key was meant to be ours."""
    letters = "".join(filter(str.isalpha, key.lower()))
    is_like = difflib.get_close_matches(letters, _NEAR_KEYS, cutoff=_NEARNESS)
    swapped = sorted(letters) == sorted(ADDITIONAL_CONFIG_KEY)
    return bool(is_like) or swapped or key.split(".")[0] == ADDITIONAL_CONFIG_KEY
