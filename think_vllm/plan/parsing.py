"""Read settings, however they were given: flags, YAML, JSON or ``additional_config``."""

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from think_vllm.errors import ThinkError
from think_vllm.plan.formats import FORMATS
from think_vllm.plan.settings import ADDITIONAL_CONFIG_KEY, ThinkConfig, flag_name

#: What may stand beside ``--kv-select static``. Formats and eviction are refused by themselves.
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


#: What else people may write for the key of our settings, letters alone.
_NEAR_KEYS = ("think", "thinkvllm", "vllmthink", "thinkkv", "kvthink")
#: How like one of these, or a setting, a key must be to be taken for it.
_NEARNESS = 0.85


def check_place(additional_config: Mapping[Any, Any]) -> None:
    """Refuse settings that look like ours where nobody reads them.

    Raises:
        ThinkError: Naming the key, and the right form.
    """
    for key, value in additional_config.items():
        if key == ADDITIONAL_CONFIG_KEY:
            continue
        is_near = _is_near(str(key))
        at_top = _nearest(key)
        found = at_top or _find_ours(value)
        # Below another key, names such as `kv_quant` may be settings of the plugin whose key it is.
        if is_near or at_top or "prune" in found or "channel" in found:
            setting = found or "kv_channel_prune"
            raise ThinkError(
                f"additional_config has {key!r}, which nobody reads; settings of think-vllm belong "
                f'below "{ADDITIONAL_CONFIG_KEY}": write {{"{ADDITIONAL_CONFIG_KEY}": '
                f'{{"{setting}": ...}}}}, or give {flag_name(setting)}'
            )


def _find_ours(value: Any) -> str:
    """The first of our settings in what somebody else's key holds; empty if there is none."""
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


#: What a person may have written who gets a truth value.
TRUTH_WORDS = {
    True: "`on`, `yes` and `true` are true",
    False: "`off`, `no` and `false` are false",
}


def value_form(name: str) -> str:
    """What a person may write for a setting that takes a value."""
    field = ThinkConfig.model_fields[name]
    if field.default == "none":
        return "`none`, or leave it out"
    return "one value" + ("" if field.default is None else f" such as `{field.default}`")


def _check_truth_values(settings: Mapping[str, Any]) -> None:
    """Refuse truth values for what takes a number or a word: they would pass for 0 and 1."""
    for name, value in settings.items():
        field = ThinkConfig.model_fields.get(name)
        if isinstance(value, bool) and field is not None and field.annotation is not bool:
            raise ThinkError(
                f"{flag_name(name)} is {value} ({TRUTH_WORDS[value]} in YAML); write "
                f"{value_form(name)}"
            )


def _check_together(config: ThinkConfig) -> None:
    """Refuse settings that were given and mean nothing beside the others."""
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
    if config.guards:
        _check_guard(config, given)
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
        grouped = [name for name, made in FORMATS.items() if made.has_groups]
        raise ThinkError(
            f"--kv-quant-group is {config.kv_quant_group}, but --kv-quant is {config.kv_quant}, "
            f"which has no groups; leave --kv-quant-group out, or use --kv-quant "
            f"{' or '.join(grouped)}"
        )


def _check_guard(config: ThinkConfig, given: list[str]) -> None:
    """Refuse what a limit on lost score mass cannot be combined with."""
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
            "hears which ones stay dense, as --kv-prefix-cache dense does; use that, or leave it "
            "out"
        )


def _check_selection(config: ThinkConfig, given: list[str]) -> None:
    """Refuse what tables of channels cannot be combined with."""
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
            f"{config.kv_quant} codes groups of them; use --kv-quant fp8, or leave one out"
        )
    if config.evicts:
        raise ThinkError(
            f"--kv-evict {config.kv_evict} packs old tokens of a prompt into thin blocks, and "
            "--kv-select static has none; leave one of them out"
        )
    meaningless = [flag_name(name) for name in given if name not in _STATIC_FIELDS]
    if meaningless:
        raise ThinkError(
            f"{', '.join(meaningless)} given with --kv-select static, where every token is pruned "
            "when it is written and nothing is compacted; leave it out"
        )


def _check_eviction(config: ThinkConfig, given: list[str]) -> None:
    """Refuse what eviction cannot be combined with."""
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
    """Refuse ways to choose channels where there is nothing to choose that way."""
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
            f"--kv-evict {config.kv_evict} packs the tokens that a prompt keeps into spans of "
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
