"""Validate settings: each by itself, and then together."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from think_vllm.errors import ThinkError
from think_vllm.plan.formats import FORMATS
from think_vllm.plan.settings import ThinkConfig, flag_name

#: What may stand beside ``--kv-select static``. Formats and eviction are rejected by themselves.
_STATIC_FIELDS = frozenset(
    {"kv_channel_prune", "kv_value_prune", "kv_select", "kv_channel_tables_file"}
    | {"kv_quant", "kv_evict"}
)


def parse_config(settings: Mapping[str, Any]) -> ThinkConfig:
    """Validate settings, each by itself and then together.

    Raises:
        ThinkError: Naming every wrong setting, what was given and what is allowed.
    """
    _check_truth_values(settings)
    try:
        config = ThinkConfig.model_validate(dict(settings))
    except ValidationError as error:
        raise ThinkError("; ".join(_explain(e) for e in error.errors())) from None
    _check_together(config)
    return config


#: What a person may have written who gets a truth value.
TRUTH_WORDS = {True: "`on`, `yes` and `true` are true", False: "`off`, `no` and `false` are false"}


def value_form(name: str) -> str:
    """What a person may write for a setting that takes a value."""
    field = ThinkConfig.model_fields[name]
    if field.default == "none":
        return "`none`, or leave it out"
    return "one value" + ("" if field.default is None else f" such as `{field.default}`")


def _check_truth_values(settings: Mapping[str, Any]) -> None:
    """Reject truth values for what takes a number or a word: they would pass for 0 and 1."""
    for name, value in settings.items():
        field = ThinkConfig.model_fields.get(name)
        if isinstance(value, bool) and field is not None and field.annotation is not bool:
            raise ThinkError(
                f"{flag_name(name)} is {value} ({TRUTH_WORDS[value]} in YAML); write "
                f"{value_form(name)}"
            )


def _check_together(config: ThinkConfig) -> None:
    """Reject settings that were given and mean nothing beside the others."""
    given = [name for name in ThinkConfig.model_fields if name in config.model_fields_set]
    enabling = {"kv_channel_prune", "kv_value_prune", "kv_quant", "kv_evict"}
    if given and not enabling.intersection(given):
        flags = ", ".join(map(flag_name, given))
        raise ThinkError(
            f"{flags} given without --kv-channel-prune RATIO or --kv-quant FORMAT (or "
            "--kv-value-prune RATIO or --kv-evict METHOD); give one of them too"
        )
    _check_selection(config, given)
    _check_eviction(config, given)
    _check_choice(config, given)
    if config.limits_loss:
        _check_loss_limit(config, given)
    if config.kv_prune_prefill and config.kv_prefix_cache == "dense":
        raise ThinkError(
            "--kv-prune-prefill prunes prompts while they are computed, so there are no exact "
            "prefixes for --kv-prefix-cache dense to keep; leave one of them out"
        )
    if config.kv_prune_prefill and not config.kv_prune_decode:
        raise ThinkError(
            "--kv-prune-prefill is for requests whose dense blocks do not fit, and with "
            "--no-kv-prune-decode what they generate stays dense; leave one of them out"
        )
    if "kv_quant_group" in given and not config.format.has_groups:
        grouped = [name for name, format in FORMATS.items() if format.has_groups]
        raise ThinkError(
            f"--kv-quant-group is {config.kv_quant_group}, but --kv-quant is {config.kv_quant}, "
            f"which has no groups; leave --kv-quant-group out, or use --kv-quant "
            f"{' or '.join(grouped)}"
        )


def _check_loss_limit(config: ThinkConfig, given: list[str]) -> None:
    """Reject what a limit on lost score mass cannot be combined with."""
    who = f"--kv-prune-max-loss {config.kv_prune_max_loss:g}"
    if not config.kv_channel_prune:
        raise ThinkError(
            f"{who} limits what the pruning of key channels loses, and none are pruned; give "
            "--kv-channel-prune too, or leave it out"
        )
    if config.kv_select != "think" or config.kv_channel_tables != "prompt":
        other = f"--kv-select {config.kv_select}"
        if config.kv_select == "think":
            other = f"--kv-channel-tables {config.kv_channel_tables}"
        raise ThinkError(
            f"{who} limits the loss of ThinK's scores over a whole prompt, which {other} does not "
            "have; leave one of them out"
        )
    if config.evicts or config.kv_prune_prefill:
        other = f"--kv-evict {config.kv_evict}" if config.evicts else "--kv-prune-prefill"
        raise ThinkError(
            f"{who} is checked when a prompt has ended, before anything of it is pruned; with "
            f"{other} that is {'too early' if config.evicts else 'too late'} to know; leave one of "
            "them out"
        )
    if "kv_prefix_cache" in given and config.kv_prefix_cache == "thin":
        raise ThinkError(
            f"{who} lets a prompt wait one step before it is compacted, so that the scheduler "
            "learns which ones stay dense, as --kv-prefix-cache dense does; use that, or leave it "
            "out"
        )


def _check_selection(config: ThinkConfig, given: list[str]) -> None:
    """Reject what tables of channels cannot be combined with."""
    file = config.kv_channel_tables_file
    if not config.is_static:
        if file is not None:
            raise ThinkError(
                f"--kv-channel-tables-file is {file}, but --kv-select is {config.kv_select}, which "
                "reads no tables; give --kv-select static too, or leave it out"
            )
        return
    if file is None:
        raise ThinkError(
            "--kv-select static needs --kv-channel-tables-file PATH; make one with "
            "`think-vllm calibrate MODEL`, or leave --kv-select out"
        )
    if config.format.has_groups:
        raise ThinkError(
            "--kv-select static writes every token into its block by itself, and --kv-quant "
            f"{config.kv_quant} quantizes groups of them; use --kv-quant fp8, or leave one out"
        )
    if config.evicts:
        raise ThinkError(
            f"--kv-evict {config.kv_evict} repacks old tokens of a prompt into thin blocks, and "
            "--kv-select static has none; leave one of them out"
        )
    meaningless = [flag_name(name) for name in given if name not in _STATIC_FIELDS]
    if meaningless:
        raise ThinkError(
            f"{', '.join(meaningless)} given with --kv-select static, where every token is pruned "
            "when it is written and nothing is compacted; leave it out"
        )


def _check_eviction(config: ThinkConfig, given: list[str]) -> None:
    """Reject what eviction cannot be combined with."""
    who = f"--kv-evict {config.kv_evict}"
    if not config.evicts:
        if "kv_evict_budget" in given:
            raise ThinkError(
                f"--kv-evict-budget is {config.kv_evict_budget}, but nothing is evicted; give "
                "--kv-evict snapkv or --kv-evict h2o too, or leave it out"
            )
    elif config.kv_prune_prefill:
        raise ThinkError(
            f"{who} chooses tokens once a prompt has ended, --kv-prune-prefill compacts them "
            "before; leave one of them out"
        )
    elif "kv_prefix_cache" in given and config.kv_prefix_cache == "thin":
        raise ThinkError(
            f"{who} keeps what a prompt's own queries ask for, and another prompt with the same "
            "beginning asks for other tokens, so --kv-prefix-cache thin has nothing to share; use "
            "--kv-prefix-cache dense, or leave it out"
        )


def _check_choice(config: ThinkConfig, given: list[str]) -> None:
    """Reject ways to select channels where there is nothing to select that way."""
    select, tables = f"--kv-select {config.kv_select}", "--kv-channel-tables span"
    pruned = max(config.kv_channel_prune, config.kv_value_prune) > 0
    if not pruned and (asked := [x for x in ("kv_select", "kv_channel_tables") if x in given]):
        flags = ", ".join(f"{flag_name(name)} {getattr(config, name)}" for name in asked)
        raise ThinkError(
            f"{flags} given, but no channels are pruned; give --kv-channel-prune RATIO too, or "
            "leave it out"
        )
    if config.kv_select == "key-norm" and not config.kv_channel_prune:
        raise ThinkError(
            f"{select} chooses key channels, and only value channels are pruned; give "
            "--kv-channel-prune RATIO too, or leave it out"
        )
    if config.kv_channel_tables == "prompt":
        return
    if not config.kv_channel_prune:
        raise ThinkError(
            f"{tables} is about key channels, and only value channels are pruned, by what they add "
            "to outputs; give --kv-channel-prune RATIO too, or leave it out"
        )
    if config.kv_select == "random":
        raise ThinkError(
            f"{select} looks at no keys, so there is nothing for {tables} to score in a span; "
            "leave one of them out"
        )
    if config.evicts:
        raise ThinkError(
            f"--kv-evict {config.kv_evict} repacks the tokens that a prompt keeps into spans of "
            f"their own, which share their channels; leave it or {tables} out"
        )


def _explain(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    flag = flag_name(name)
    if error["type"] == "extra_forbidden":
        known = ", ".join(ThinkConfig.model_fields)
        return f"unknown setting {name}={error['input']!r}; known are {known}"
    field = ThinkConfig.model_fields.get(name)
    meaning = f" ({field.description})" if field is not None and field.description else ""
    return f"{flag} is {error['input']!r}: {error['msg']}{meaning}"
