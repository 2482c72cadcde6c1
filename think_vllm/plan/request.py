"""Per-request overrides: what one request may ask for, and the rule that its spans then have.

vLLM hands ``vllm_xargs`` of its HTTP server, offline ``SamplingParams.extra_args``, to the front
end, the scheduler and every worker. The front end rejects what is wrong; scheduler and workers
derive the same rule from the same parameters, so they exchange no messages about it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from think_vllm.errors import ThinkError
from think_vllm.plan.settings import ADDITIONAL_CONFIG_KEY
from think_vllm.plan.spans import ENDLESS, SpanRule

#: ``false`` keeps all blocks of the request as computed.
PRUNE = "kv_channel_prune"
#: Old tokens that each KV head keeps of this prompt; ``false`` or 0 for all of them.
BUDGET = "kv_evict_budget"
#: What vLLM itself reads there under names that begin alike.
VLLM_NAMES = frozenset({"kv_transfer_params", "kv_cache_report_mode"})

_WHERE = "(vllm_xargs; offline SamplingParams.extra_args)"


def request_override(rule: SpanRule, extra_args: Mapping[str, Any] | None) -> SpanRule | None:
    """Read what a request asks for.

    Args:
        rule: Of its server.
        extra_args: Of its sampling parameters.

    Returns:
        The request's rule; None if it is the server's.

    Raises:
        ThinkError: If a name or a value is wrong, or is not for this server.
    """
    if not extra_args:
        return None
    _check_names(extra_args)
    pruned = _read_switch(extra_args[PRUNE]) if PRUNE in extra_args else True
    budget = _read_budget(extra_args[BUDGET]) if BUDGET in extra_args else None
    if pruned:
        own = rule if budget is None else _with_budget(rule, budget)
        return None if own == rule else own
    if budget:
        raise ThinkError(
            f"{PRUNE} is false and {BUDGET} is {budget} {_WHERE}: a request that stays dense keeps "
            f"all its tokens; leave one of them out"
        )
    if rule.prune_prefill:
        raise ThinkError(
            f"{PRUNE} is false {_WHERE}, but this server has --kv-prune-prefill, whose requests "
            "may be longer than what fits its cache densely; leave it out, or ask a server "
            "without --kv-prune-prefill"
        )
    return dense_rule(rule)


def reject_settings(extra_args: Mapping[str, Any]) -> None:
    """Reject whatever a request asks of a server whose blocks are pruned as they are written.

    Raises:
        ThinkError: If it asks for something.
    """
    _check_names(extra_args)
    asked = [name for name in (PRUNE, BUDGET) if name in extra_args]
    if asked:
        raise ThinkError(
            f"{' and '.join(asked)} {_WHERE}, but this server has --kv-select static, whose blocks "
            "are pruned as they are written, for all requests alike; leave it out, or ask a server "
            "without --kv-select static"
        )


def dense_rule(rule: SpanRule) -> SpanRule:
    """The rule of a request that stays dense."""
    return replace(rule, recent_window=ENDLESS, budget_spans=None)


def _check_names(extra_args: Mapping[str, Any]) -> None:
    known = {PRUNE, BUDGET, *VLLM_NAMES}
    spelt = {name: name.lower().replace("-", "_") for name in extra_args}
    unknown = [
        name
        for name, plain in spelt.items()
        if name not in known and (plain.startswith("kv_") or plain == ADDITIONAL_CONFIG_KEY)
    ]
    if unknown:
        raise ThinkError(
            f"{', '.join(sorted(unknown))} {_WHERE}: a request can set {PRUNE} (false: it stays "
            f"dense) and {BUDGET} (tokens); the rest are settings of the server. Leave "
            f"{'it' if len(unknown) == 1 else 'them'} out"
        )


def _read_switch(value: Any) -> bool:
    """A truth value, which vLLM's HTTP server turns into 0 or 1."""
    read = value.strip().lower() if isinstance(value, str) else value
    if isinstance(read, str):
        read = {"false": 0, "0": 0, "true": 1, "1": 1}.get(read)
    if isinstance(read, int | float) and (read == 0 or (read == 1 and isinstance(read, int))):
        return bool(read)
    raise ThinkError(
        f"{PRUNE} is {value!r} {_WHERE}: a request has the server's channels or all of them; give "
        "false to keep its blocks dense, or leave it out"
    )


def _read_budget(value: Any) -> int:
    """Tokens; 0 for all of the prompt's."""
    read = value.strip().lower() if isinstance(value, str) else value
    if isinstance(read, str):
        read = 0 if read == "false" else int(read) if read.isdecimal() else None
    if isinstance(read, int) and read is not True and read >= 0:
        return int(read)
    raise ThinkError(
        f"{BUDGET} is {value!r} {_WHERE}: give a whole number of tokens, or false to evict none of "
        "this request's, or leave it out"
    )


def _with_budget(rule: SpanRule, budget: int) -> SpanRule:
    if budget == 0:
        return replace(rule, budget_spans=None)
    if rule.budget_spans is None:
        raise ThinkError(
            f"{BUDGET} is {budget} {_WHERE}, but this server evicts nothing; leave it out, or ask "
            "a server with --kv-evict"
        )
    spans = budget // rule.span_tokens
    if spans == 0:
        raise ThinkError(
            f"{BUDGET} is {budget} {_WHERE}: kept tokens are packed in whole spans, which have "
            f"{rule.span_tokens} tokens here; give {rule.span_tokens} or more, or false to evict "
            "none of this request's"
        )
    return replace(rule, budget_spans=spans)
