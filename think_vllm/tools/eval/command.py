"""``think-vllm eval``: the quality of served models, against each other on the same prompts."""

import sys
from collections.abc import Sequence

from think_vllm.tools.common.interrupts import Interrupted, interruptible
from think_vllm.tools.eval.evaluation import Evaluation
from think_vllm.tools.eval.options import parse_options
from think_vllm.tools.eval.report import ANSWERS_FILE, REPORT_FILE


def evaluate(arguments: Sequence[str]) -> int:
    """Run an evaluation; return its exit status.

    Raises:
        ThinkError: If it cannot be run as asked.
    """
    options = parse_options(arguments)
    evaluation = Evaluation(options, arguments)
    try:
        with interruptible():
            failed = evaluation.run()
    except Interrupted as interrupted:
        print(f"eval: {interrupted}; nothing is left running", file=sys.stderr)
        return 128 + interrupted.number
    print((options.out / REPORT_FILE).read_text(encoding="utf-8"), end="")
    print(f"\nWritten to {options.out}", file=sys.stderr)
    if failed:
        answers = options.out / ANSWERS_FILE
        print(f"eval: {failed} requests failed; {answers} says why", file=sys.stderr)
    return 1 if failed else 0
