"""Whether vLLM loads this plugin, which a variable can forbid."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from think_vllm.cli.config_file import read_settings
from think_vllm.config import ADDITIONAL_CONFIG_KEY, ThinkConfig, flag_name
from think_vllm.errors import ThinkError

#: vLLM's list of the plugins that it loads; all if it is not set.
VARIABLE = "VLLM_PLUGINS"
#: Group of entry points, and the one of ours that vLLM must find there.
PLUGIN_GROUP, PLUGIN_NAME = "vllm.general_plugins", "think_vllm"


def left_out(environment: Mapping[str, str] = os.environ) -> str:
    """Why vLLM does not load this plugin, and the way out; empty if it does."""
    chosen = environment.get(VARIABLE)
    if chosen is None or PLUGIN_NAME in chosen.split(","):
        return ""
    names = ",".join(filter(None, [chosen, PLUGIN_NAME]))
    return (
        f"{VARIABLE} is {chosen!r}, so vLLM does not load it; set {VARIABLE}={names}, or unset it"
    )


def check_loaded(arguments: Sequence[str]) -> None:
    """Refuse arguments of `serve` that only this plugin understands where it is not loaded.

    Raises:
        ThinkError: Naming the variable, the first of these arguments, and the way out.
    """
    why = left_out()
    used = why and next(iter(_ours(arguments)), "")
    if used:
        raise ThinkError(f"{used} is an option of think-vllm, and {why}")


def _ours(arguments: Sequence[str]) -> Iterable[str]:
    quoted = f'"{ADDITIONAL_CONFIG_KEY}"'
    names = {option for x in ThinkConfig.model_fields for option in (flag_name(x), _no(x))}
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, _, value = word.replace("_", "-").partition("=")
        if option in names:
            yield option
        elif option == "--additional-config" and quoted in (value or following):
            yield f"{option} with {ADDITIONAL_CONFIG_KEY!r}"
        elif option.startswith(f"--additional-config.{ADDITIONAL_CONFIG_KEY}"):
            yield option
        elif option == "--config":
            yield from _of_file(read_settings(word.partition("=")[2] or following), names)


def _of_file(settings: Mapping[str, Any], names: set[str]) -> Iterable[str]:
    yield from (option for option in settings if option in names)
    additional = settings.get("--additional-config")
    if isinstance(additional, Mapping) and ADDITIONAL_CONFIG_KEY in additional:
        yield f"additional-config with {ADDITIONAL_CONFIG_KEY!r}"


def _no(name: str) -> str:
    return f"--no-{flag_name(name).removeprefix('--')}"
