"""The ``think-vllm`` program."""

import sys
from collections.abc import Sequence

from think_vllm import __version__
from think_vllm.errors import ThinkError

USAGE = """usage: think-vllm COMMAND ...

commands:
  serve MODEL [flags]   vLLM's OpenAI-compatible server; the arguments of `vllm serve`
  plan MODEL [flags]    the block plan of a model, without starting anything
  calibrate MODEL       channel tables of a model, for --kv-select static
  doctor MODEL [flags]  go or no-go: machine, model, plan, answers with and without thin blocks
  bench MODEL [flags]   load tests: plain vLLM and thin blocks in equal memory
  eval [flags]          quality of served models, with intervals, on the same prompts

`think-vllm COMMAND --help` says more.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        sys.stdout.write(f"think-vllm {__version__}\n")
        return 0
    command, rest = arguments[0], arguments[1:]
    try:
        if command == "serve":
            from think_vllm.tools.serve import serve

            return serve(rest)
        if command == "plan":
            from think_vllm.tools.plan import plan

            return plan(rest)
        if command == "calibrate":
            from think_vllm.tools.calibrate.command import calibrate

            return calibrate(rest)
        if command == "doctor":
            from think_vllm.tools.doctor.command import doctor

            return doctor(rest)
        if command == "bench":
            from think_vllm.tools.bench.command import bench

            return bench(rest)
        if command == "eval":
            from think_vllm.tools.eval.command import evaluate

            return evaluate(rest)
    except ThinkError as error:
        sys.stderr.write(f"think-vllm: error: {error}\n")
        return 2
    sys.stderr.write(f"think-vllm: unknown command {command!r}\n\n{USAGE}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
