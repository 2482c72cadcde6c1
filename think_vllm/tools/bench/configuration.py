"""The servers of a run, and their flags: vLLM's own parser reads them before anything starts."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from think_vllm.errors import ThinkError
from think_vllm.hooks import engine
from think_vllm.hooks.model_support import attention_layers
from think_vllm.plan.additional_config import config_from_additional
from think_vllm.plan.settings import ADDITIONAL_CONFIG_KEY, ThinkConfig, flag_name
from think_vllm.tools.common.flags import split_flags

Kind = Literal["plain", "fp8 cache", "thin", "other", "external"]

PLAIN = "plain"
FP8_CACHE = "fp8 cache"
FP8_CACHE_FLAGS = ("--kv-cache-dtype", "fp8")
#: The recommended ones, see the README.
DEFAULT_FLAGS = (
    "--kv-channel-prune 0.5 --kv-quant fp8",
    "--kv-channel-prune 0.4 --kv-quant kivi4",
    "--kv-channel-prune 0.5 --kv-quant k4v2",
)
#: Flags that must be the same for all servers, and which option sets them.
COMMON_FLAGS = {
    "--kv-cache-memory-bytes": "--kv-cache-memory-bytes SIZE",
    "--gpu-memory-utilization": "--kv-cache-memory-bytes SIZE",
    "--max-num-seqs": "--max-num-seqs N",
    "--dtype": '--server-args "--dtype TYPE"',
    "--max-model-len": '--server-args "--max-model-len N"',
    "--max-num-batched-tokens": '--server-args "--max-num-batched-tokens N"',
}
#: Flags that are chosen here.
OWN_FLAGS = ("--host", "--port", "--uds", "--model", "--config", "--served-model-name", "--api-key")


@dataclass(frozen=True)
class Configuration:
    """One server to be measured."""

    label: str  # how reports call it
    kind: Kind  # what it is compared as
    flags: tuple[str, ...] = ()  # those that make it differ from the others


@dataclass(frozen=True)
class Engine:
    """What vLLM makes of a configuration."""

    max_model_len: int  # tokens of the longest request
    thin: engine.Engine | None  # thin blocks; None without
    prefix_caching: bool  # whether prefixes are cached
    windowed: bool  # whether some layers have a sliding window, of which the plan does not speak

    def blocks_for(self, num_tokens: int, block_size: int) -> int | None:
        """Blocks that a request holds; None if the plan does not say.

        Args:
            num_tokens: Of prompt and answer.
            block_size: Tokens of a dense block.
        """
        if self.windowed:
            return None
        if self.thin is not None and self.thin.plan is not None:
            return self.thin.plan.blocks_for(num_tokens)
        # Static pruning makes blocks smaller, not fewer.
        return -(-num_tokens // block_size)


def make_configurations(
    texts: Sequence[str], plain: bool = True, fp8_cache: bool = False
) -> list[Configuration]:
    """The servers of a run, the reference first.

    Args:
        texts: Flags of further servers, each as one would type them.
        plain: Whether vLLM without flags is among them.
        fp8_cache: Whether vLLM's own fp8 cache is.

    Raises:
        ThinkError: If flags cannot be split, are given twice, or set what all servers share.
    """
    configurations = [Configuration(PLAIN, "plain")] if plain else []
    if fp8_cache:
        configurations.append(Configuration(FP8_CACHE, "fp8 cache", FP8_CACHE_FLAGS))
    for text in texts:
        flags = _flags(text, "--config")
        for flag in map(_name, flags):
            if flag in COMMON_FLAGS:
                raise ThinkError(
                    f"bench: --config {text!r}: {flag} has to be the same for all servers, or "
                    f"they cannot be compared; use {COMMON_FLAGS[flag]}"
                )
        enabling = ("kv_channel_prune", "kv_value_prune", "kv_quant", "kv_evict")
        ours = {*map(flag_name, enabling)}
        kind: Kind = "thin" if ours.intersection(map(_name, flags)) else "other"
        configurations.append(Configuration(_label(flags), kind, flags))
    labels = [one.label for one in configurations]
    for label in labels:
        if labels.count(label) > 1:
            raise ThinkError(f"bench: --config {label!r} is given twice; leave one out")
    return configurations


def _flags(text: str, option: str) -> tuple[str, ...]:
    flags = split_flags(text, f"bench: {option}")
    for flag in map(_name, flags):
        if flag in OWN_FLAGS:
            raise ThinkError(f"bench: {option} {text!r}: {flag} is chosen here; leave it out")
    return flags


def shared_flags(text: str) -> tuple[str, ...]:
    """Split the flags of all servers.

    Raises:
        ThinkError: If there are some among them that would make plain vLLM another one.
    """
    flags = _flags(text, "--server-args")
    ours = {flag_name(name) for name in ThinkConfig.model_fields}
    for flag in map(_name, flags):
        if flag in ours or flag == FP8_CACHE_FLAGS[0]:
            raise ThinkError(
                f"bench: --server-args {text!r}: {flag} would hold for plain vLLM too; give it "
                "in --config"
            )
        if flag in ("--kv-cache-memory-bytes", "--max-num-seqs"):
            raise ThinkError(
                f"bench: --server-args {text!r}: {flag} is an option of its own here; use "
                f"{COMMON_FLAGS[flag]}"
            )
    return flags


def read_engine(model: str, arguments: Sequence[str], who: str) -> Engine:
    """Let vLLM read a server's arguments and the model's config.

    Args:
        model: Name or directory.
        arguments: Of `serve`.
        who: What an error begins with.

    Raises:
        ThinkError: If they are wrong, or the model cannot be served with them.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from think_vllm.hooks.moved import moved
    from think_vllm.plugin import register

    class Parser(FlexibleArgumentParser):  # type: ignore[misc,unused-ignore]
        """A parser that raises."""

        def error(self, message: str) -> NoReturn:
            raise ThinkError(f"{who}: {message}")

    register()
    parser: argparse.ArgumentParser = moved("make_arg_parser")(Parser(prog="think-vllm serve"))
    namespace = parser.parse_args([model, *arguments])
    namespace.model = model
    settings = config_from_additional(
        {ADDITIONAL_CONFIG_KEY: (namespace.additional_config or {}).get(ADDITIONAL_CONFIG_KEY)}
    )
    try:
        model_config: Any = EngineArgs.from_cli_args(namespace).create_model_config()
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or repr(error)
        raise ThinkError(f"{who}: vLLM cannot read the model {model!r}: {reason}") from None
    thin = None
    if settings is not None:
        cache_dtype = namespace.kv_cache_dtype
        thin = engine.plan_engine(
            settings,
            model_config,
            namespace.block_size,
            cache_dtype=cache_dtype,
            parallel=namespace,
        )
    return Engine(
        max_model_len=model_config.max_model_len,
        thin=thin,
        # vLLM's default, for models that generate text.
        prefix_caching=namespace.enable_prefix_caching is not False
        and (settings is None or settings.allows_prefix_caching),
        windowed=attention_layers(model_config).window > 0,
    )


def _name(flag: str) -> str:
    """A flag without its value, as vLLM's parser spells it; other words as they are."""
    return flag.split("=", 1)[0].replace("_", "-") if flag.startswith("--") else flag


def _label(flags: Sequence[str]) -> str:
    """The ratio and the format in words, other flags as they are."""
    parts, rest = [], []
    words = iter(
        piece for flag in flags for piece in (flag.split("=", 1) if "=" in flag else [flag])
    )
    for word in words:
        if _name(word) == flag_name("kv_channel_prune"):
            parts.append(f"prune {next(words, '?')}")
        elif _name(word) == flag_name("kv_value_prune"):
            parts.append(f"values {next(words, '?')}")
        elif _name(word) == flag_name("kv_quant"):
            parts.append(next(words, "?"))
        else:
            rest.append(word)
    return " ".join(filter(None, [" + ".join(parts), *rest]))
