"""The doctor's arithmetic, and the prompts it makes."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from think_vllm.hooks.patches.patch import Kind, Patch
from think_vllm.tools.doctor.comparison import compare
from think_vllm.tools.doctor.finding import Finding, Level
from think_vllm.tools.doctor.patches import check_patches
from think_vllm.tools.doctor.probe import ProbeJob, ProbeResult, make_prompts


def result(logprobs: list[list[float]], likeliest: list[list[int]]) -> ProbeResult:
    tokens = [[7, 8, 9], [7, 7, 7]]
    return ProbeResult(prompts=[[1, 2], [3]], tokens=tokens, logprobs=logprobs, likeliest=likeliest)


DENSE = result([[-1.0, -0.5, -0.5], [-2.0, -0.1, -0.2]], [[7, 8, 9], [7, 7, 7]])


def test_first_tokens_do_not_count() -> None:
    thin = result([[-9.0, -0.5, -0.9], [-9.0, -0.1, -0.4]], [[1, 8, 9], [1, 7, 5]])
    got = compare(DENSE, thin)
    assert got.tokens == 4
    assert got.mean_difference == pytest.approx((0.4 + 0.2) / 4)
    assert got.largest_difference == pytest.approx(0.4)
    assert got.perplexity_change == pytest.approx(math.exp(0.15) - 1)
    assert got.agreement == 0.75


@pytest.mark.parametrize(
    ("change", "agreement", "reasons"),
    [(0.17, 0.75, 0), (0.16, 0.75, 1), (0.17, 0.76, 1), (0.0, 1.0, 2)],
)
def test_each_limit_is_a_reason(change: float, agreement: float, reasons: int) -> None:
    thin = result([[-1.0, -0.5, -0.9], [-2.0, -0.1, -0.4]], [[7, 8, 9], [7, 7, 5]])
    assert len(compare(DENSE, thin).reasons_against(change, agreement)) == reasons


def test_nan_is_a_reason() -> None:
    thin = result([[-1.0, math.nan, -0.9], [-2.0, -0.1, -0.4]], [[7, 8, 9], [7, 7, 7]])
    assert len(compare(DENSE, thin).reasons_against(100.0, 0.0)) == 1


def test_other_tokens_are_no_comparison() -> None:
    other = DENSE.model_copy(update={"tokens": [[7, 8, 1], [7, 7, 7]]})
    with pytest.raises(ValueError, match="not over the same"):
        compare(DENSE, other)


def job(**settings: object) -> ProbeJob:
    fields = {"arguments": [], "model": "m", "dense": True, "out": "x"}
    fields |= {"num_prompts": 3, "prompt_tokens": 200, "new_tokens": 1}
    return ProbeJob.model_validate(fields | settings)


@pytest.mark.parametrize("pieces", [1, 3], ids=["words", "three-tokens-a-word"])
def test_recall_prompts_nearly_fill_their_length(pieces: int) -> None:
    prompts = make_prompts(job(), lambda text: [0] * (1 + pieces * len(text.split())))
    assert len(prompts) == 3
    assert all(140 <= len(prompt) <= 200 for prompt in prompts), [len(x) for x in prompts]


def test_prompts_are_cut_from_a_text(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("0123456789")
    encode = lambda text: list(map(int, text))  # noqa: E731
    cut = make_prompts(job(text=text, prompt_tokens=4), encode)
    assert cut == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match="10 tokens are less than one prompt of 11"):
        make_prompts(job(text=text, prompt_tokens=11), encode)


@pytest.mark.parametrize(
    ("device", "level"), [(None, Level.BAD), ("cpu", Level.BAD), ("cuda", Level.NOTE)]
)
def test_what_vllm_lacks_stands_in_the_way_where_it_is_needed(device, level, monkeypatch):
    there = Patch("argparse:Action", Kind.READ, "hooks.flags", "reason", None)
    missing = Patch("nowhere:A.b", Kind.CALLED, "hooks.flags", "reason", "change", device=device)
    monkeypatch.setattr("think_vllm.tools.doctor.patches.PATCHES", (there, missing))
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(device_type="cpu"))
    assert [str(finding) for finding in check_patches()] == [
        "ok     patch: argparse:Action is read: reason",
        f"{level.value:<6} patch: there is no nowhere:A.b, which think_vllm.hooks.flags needs. "
        "nowhere:A.b is called: reason; until change",
    ]


def test_a_finding_is_a_line() -> None:
    assert str(Finding(Level.BAD, "plan", "no")) == "no-go  plan: no"
