"""Rows of the quality table: exact match of recall answers, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

from think_vllm.tools.eval.recall import CODE_DIGITS, RecallSample
from think_vllm.tools.eval.stats import wilson_interval

HEADER = (
    "| measured on | keys pruned | format | channels by | thin | right "
    "| 95 % interval | record thin: right |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


@dataclass(frozen=True)
class Setting:
    """What one row measures.

    Args:
        where: ``served`` or ``simulated``.
        ratio: Share of key channels that is pruned.
        format: Of old keys and values.
        policy: What chooses the channels.
    """

    where: str
    ratio: float
    format: str
    policy: str


def table_row(
    setting: Setting,
    samples: Sequence[RecallSample],
    thin_tokens: Sequence[int],
    right: Sequence[bool],
) -> str:
    """One row of the table.

    Args:
        setting: What was measured.
        samples: The prompts.
        thin_tokens: Per sample, how many of the prompt's first tokens were thin.
        right: Per sample, whether all four digits were.
    """
    hits, count = sum(right), len(samples)
    low, high = wilson_interval(hits, count)
    thin = sum(thin_tokens) / sum(sample.num_prompt_tokens for sample in samples)
    of_thin = [
        hit
        for sample, tokens, hit in zip(samples, thin_tokens, right, strict=True)
        if record_end(sample) <= tokens
    ]
    cells = [
        setting.where,
        f"{setting.ratio:g}",
        setting.format,
        setting.policy if setting.ratio else "-",
        f"{100 * thin:.0f} %",
        f"{hits / count:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{sum(of_thin)} of {len(of_thin)}" if of_thin else "-",
    ]
    return f"| {' | '.join(cells)} |"


def record_end(sample: RecallSample) -> int:
    """Tokens of the prompt, ``<s>`` included, up to the last digit of the record asked for."""
    words = sample.prompt.split()
    key = words[-2]  # of the question; keys are distinct, so it stands first in its record
    key_and_is = 2
    return 1 + words.index(key) + key_and_is + CODE_DIGITS
