"""The flags: sugar for ``--additional-config '{"think": {...}}'``."""

import argparse
from typing import Any

from think_vllm import compat
from think_vllm.config import ADDITIONAL_CONFIG_KEY, MAX_PRUNE_RATIO, ThinkConfig, parse_config
from think_vllm.errors import ThinkError

_TYPES: dict[str, type] = {
    "kv_channel_prune": float,
    "kv_recent_window": int,
    "kv_observation_window": int,
}
_METAVARS = {"kv_channel_prune": "RATIO"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add our flags to a parser of vLLM's engine arguments.

    After parsing they are validated together and moved into ``additional_config``, which
    vLLM carries to every process.
    """
    if _has_flags(parser):
        return
    declare_flags(parser)

    def fold(namespace: argparse.Namespace) -> bool:
        try:
            fold_flags(namespace)
        except ThinkError as error:
            parser.error(str(error))
        return ADDITIONAL_CONFIG_KEY in (getattr(namespace, "additional_config", None) or {})

    compat.fold_after_parsing(parser, fold)


def declare_flags(parser: argparse.ArgumentParser) -> None:
    """Add the bare options, without moving them anywhere."""
    group = parser.add_argument_group(
        "think-vllm", "KV cache channel pruning (ThinK, arXiv 2407.21018)."
    )
    for name, field in ThinkConfig.model_fields.items():
        options: dict[str, Any] = {
            "default": None,
            "help": f"{field.description} Default: {field.default}."
            + (f" At most {MAX_PRUNE_RATIO}." if name == "kv_channel_prune" else ""),
        }
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = _TYPES[name]
            options["metavar"] = _METAVARS.get(name, "TOKENS")
        group.add_argument("--" + name.replace("_", "-"), **options)


def take_flags(namespace: argparse.Namespace) -> dict[str, Any]:
    """Remove our options from a namespace and return those that were given."""
    given: dict[str, Any] = {}
    for name in ThinkConfig.model_fields:
        value = vars(namespace).pop(name, None)
        if value is not None:
            given[name] = value
    return given


def fold_flags(namespace: argparse.Namespace) -> None:
    """Move our options into ``namespace.additional_config``, over what JSON gave there.

    Raises:
        ThinkError: If a value is out of range, or windows are set without a ratio.
    """
    given = take_flags(namespace)
    additional = dict(getattr(namespace, "additional_config", None) or {})
    settings = additional.get(ADDITIONAL_CONFIG_KEY)
    if not given:
        return
    merged = {**settings, **given} if isinstance(settings, dict) else given
    config = parse_config(merged)
    if "kv_channel_prune" not in merged:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ThinkError(f"{flags} given without --kv-channel-prune RATIO; give it too")
    additional[ADDITIONAL_CONFIG_KEY] = config.model_dump()
    namespace.additional_config = additional


def _has_flags(parser: argparse.ArgumentParser) -> bool:
    return any(action.dest == "kv_channel_prune" for action in parser._actions)
