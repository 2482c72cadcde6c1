"""The flags: sugar for ``--additional-config '{"think": {...}}'``."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from think_vllm.errors import ThinkError
from think_vllm.hooks.command_line import note_request
from think_vllm.hooks.installation import install
from think_vllm.hooks.patches.patch import Role
from think_vllm.plan.additional_config import settings_of
from think_vllm.plan.parsing import parse_config
from think_vllm.plan.settings import ADDITIONAL_CONFIG_KEY, MAX_PRUNE_RATIO, ThinkConfig, flag_name

_METAVARS = {
    "kv_channel_prune": "RATIO",
    "kv_value_prune": "RATIO",
    "kv_quant": "FORMAT",
    "kv_quant_group": "N",
    "kv_select": "POLICY",
    "kv_channel_tables": "SCOPE",
    "kv_prefix_cache": "FORM",
    "kv_evict": "METHOD",
    "kv_prune_max_loss": "SHARE",
    "kv_channel_tables_file": "PATH",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add our flags to a parser of vLLM's engine arguments.

    After parsing they are validated together and moved into ``additional_config``, which
    vLLM carries to every process.
    """
    if not _has_flags(parser):
        declare_flags(parser)
    install(Role.PARSER)


def parse_known_args(
    original: Callable[..., Any], parser: argparse.ArgumentParser, *args: Any, **kwargs: Any
) -> Any:
    """Fold our flags after a parser that has them, before anything else reads its results."""
    parsed, rest = original(parser, *args, **kwargs)
    if _has_flags(parser):
        try:
            fold_flags(parsed)
        except ThinkError as error:
            parser.error(str(error))
        if ADDITIONAL_CONFIG_KEY in (getattr(parsed, "additional_config", None) or {}):
            note_request()
    return parsed, rest


def declare_flags(parser: argparse.ArgumentParser) -> None:
    """Add the bare options, without moving them anywhere."""
    group = parser.add_argument_group(
        "think-vllm",
        "Thin KV blocks: pruned channels of keys and values (ThinK, arXiv 2407.21018), quantized "
        "keys and values (KIVI, arXiv 2402.02750), or both.",
    )
    for name, field in ThinkConfig.model_fields.items():
        group.add_argument(flag_name(name), default=None, **_options(name, field))


def _options(name: str, field: FieldInfo) -> dict[str, Any]:
    """What argparse needs to know about a setting."""
    text = f"{field.description} Default: {'none' if field.default is None else field.default}."
    if field.annotation is bool:
        return {"action": argparse.BooleanOptionalAction, "help": text}
    options: dict[str, Any] = {"metavar": _METAVARS.get(name, "TOKENS")}
    if get_origin(field.annotation) is Literal:
        choices = get_args(field.annotation)
        text += f" One of {', '.join(map(str, choices))}."
        return {**options, "type": type(choices[0]), "choices": choices, "help": text}
    if _METAVARS.get(name) == "PATH":
        return {**options, "type": str, "help": text}
    if _METAVARS.get(name) == "RATIO":
        text += f" At most {MAX_PRUNE_RATIO}."
    return {**options, "type": field.annotation, "help": text}


def take_flags(namespace: argparse.Namespace) -> dict[str, Any]:
    """Remove our options from a namespace and return those that were set."""
    flags: dict[str, Any] = {}
    for name in ThinkConfig.model_fields:
        value = vars(namespace).pop(name, None)
        if value is not None:
            flags[name] = value
    return flags


def fold_flags(namespace: argparse.Namespace) -> None:
    """Move our options into ``namespace.additional_config``, over those from JSON.

    Raises:
        ThinkError: If a value is out of range, means nothing beside the others, or stands where
            it is not read.
    """
    flags = take_flags(namespace)
    additional = getattr(namespace, "additional_config", None) or {}
    if not isinstance(additional, Mapping):
        if not flags:
            return  # vLLM checks it
        raise ThinkError(
            f"--additional-config is {additional!r}; it must be an object, beside which "
            f"{flag_name(next(iter(flags)))} can stand"
        )
    settings = settings_of(additional)
    if not flags:
        return
    config = parse_config({**(settings or {}), **flags})
    # Every process checks them again, so defaults must not look as if the user had set them.
    ours = config.model_dump(exclude_unset=True)
    namespace.additional_config = {**additional, ADDITIONAL_CONFIG_KEY: ours}


def _has_flags(parser: argparse.ArgumentParser) -> bool:
    return any(action.dest == "kv_channel_prune" for action in parser._actions)
