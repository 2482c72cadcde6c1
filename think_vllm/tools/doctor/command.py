"""``think-vllm doctor``: go or no-go for a model with some flags on this machine."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from think_vllm.tools.doctor.finding import Level
from think_vllm.tools.plan import positive_int

_DESCRIPTION = """
Check versions, patches of vLLM, machine, model support and plan, then generate a little with and
without thin blocks, one engine after the other: the engine with them follows the tokens that the
one without chooses. All other arguments are those of `vllm serve`. Exit status: 0 go, 1 no-go,
2 wrong usage. A short look at a few prompts, no evaluation.
"""


def doctor(arguments: Sequence[str]) -> int:
    """Print findings and the result; return 0 for go and 1 for no-go."""
    parser = _parser()
    options, rest = parser.parse_known_args(list(arguments))
    # What vLLM says while it starts would hide the findings.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # Heavy, and not needed to explain the command line.
    from think_vllm.tools.doctor.examination import Examination

    examination = Examination(options.model, rest, options if options.generation else None)
    findings = []
    for finding in examination.findings():
        findings.append(finding)
        if not options.json:
            print(finding, flush=True)
    reasons = [finding for finding in findings if finding.level is Level.BAD]
    if options.json:
        lines = [vars(finding) | {"level": finding.level.value} for finding in findings]
        print(json.dumps({"go": not reasons, "findings": lines, **examination.fields()}, indent=2))
    else:
        print("NO-GO" if reasons else "GO")
    return 1 if reasons else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="think-vllm doctor",
        description=_DESCRIPTION,
        # What it does not know is vLLM's, and must not be taken for a short form.
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", help="Model name or directory.")
    yes_or_no = argparse.BooleanOptionalAction
    text = "Start engines and compare answers. Default: yes."
    add("--generation", action=yes_or_no, default=True, help=text)
    text = "File to cut prompts from. Default: made-up facts to recall."
    add("--text", type=Path, help=text)
    add("--num-prompts", type=positive_int, default=8, help="Default: 8.")
    add("--prompt-tokens", type=positive_int, default=1024, help="Default: 1024.")
    add("--new-tokens", type=positive_int, default=64, help="Default: 64.")
    text = "Largest relative change of perplexity on the dense answers. Default: 0.05."
    add("--max-perplexity-change", type=float, default=0.05, help=text)
    text = "Least share of steps whose likeliest token is the same. Default: 0.9."
    add("--min-agreement", type=float, default=0.9, help=text)
    add("--json", action="store_true", help="Print JSON.")
    return parser
