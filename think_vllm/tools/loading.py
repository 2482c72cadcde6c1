"""Whether vLLM loads this plugin, which a variable can forbid."""

import contextlib
import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from think_vllm.errors import ThinkError
from think_vllm.hooks.config_file import OUR_NEGATIONS, OUR_OPTIONS, read_settings
from think_vllm.plan.additional_config import settings_of
from think_vllm.plan.settings import ADDITIONAL_CONFIG_KEY

#: vLLM's list of the plugins that it loads; all if it is not set.
VARIABLE = "VLLM_PLUGINS"
#: Group of entry points, and the one of ours that vLLM must find there.
PLUGIN_GROUP, PLUGIN_NAME = "vllm.general_plugins", "think_vllm"


def left_out(environment: Mapping[str, str] = os.environ) -> str:
    """Why vLLM does not load this plugin, and the remedy; empty if it does."""
    chosen = environment.get(VARIABLE)
    if chosen is None or PLUGIN_NAME in chosen.split(","):
        return ""
    others = [name for x in chosen.split(",") if (name := x.strip()) not in ("", PLUGIN_NAME)]
    wanted = shlex.quote(",".join([*others, PLUGIN_NAME]))
    return (
        f"{VARIABLE} is {chosen!r}, so vLLM does not load it; set {VARIABLE}={wanted}, or unset it"
    )


def check_loaded(arguments: Sequence[str]) -> None:
    """Reject arguments of `serve` that only this plugin understands where it is not loaded.

    Raises:
        ThinkError: Naming the variable, the first of these arguments, and the remedy.
    """
    why = left_out()
    used = why and next(iter(_ours(arguments)), "")
    if used:
        raise ThinkError(f"{used} is an option of think-vllm, and {why}")


def _ours(arguments: Sequence[str]) -> Iterable[str]:
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        option = option.replace("_", "-") if "." not in option else option
        value = value if equals else following
        if option == "--config":
            for name, said in read_settings(value).items():
                yield from _uses(name, said)
        else:
            yield from _uses(option, value)


def _uses(option: str, value: Any) -> Iterable[str]:
    """The option, if it is ours or says something that is."""
    dotted = option.replace("_", "-").startswith(f"--additional-config.{ADDITIONAL_CONFIG_KEY}")
    if option in OUR_OPTIONS or option in OUR_NEGATIONS or dotted:
        yield option
    elif option == "--additional-config":
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = json.loads(value)
        with contextlib.suppress(ThinkError):
            if not isinstance(value, Mapping) or settings_of(value) is None:
                return
        yield f"{option} with {ADDITIONAL_CONFIG_KEY!r}"
