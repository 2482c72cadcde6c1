"""The ``think-vllm`` program."""

import sys
from collections.abc import Sequence
from importlib import import_module

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

#: Module and function of each.
_COMMANDS = {
    "serve": ("serve", "serve"),
    "plan": ("plan", "plan"),
    "calibrate": ("calibrate.command", "calibrate"),
    "doctor": ("doctor.command", "doctor"),
    "bench": ("bench.command", "bench"),
    "eval": ("eval.command", "evaluate"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        sys.stdout.write(f"think-vllm {__version__}\n")
        return 0
    command, *rest = arguments
    if command not in _COMMANDS:
        sys.stderr.write(f"think-vllm: unknown command {command!r}\n\n{USAGE}")
        return 2
    module, function = _COMMANDS[command]
    try:
        # Only what the command needs: some imports take seconds.
        status: int = getattr(import_module(f"think_vllm.tools.{module}"), function)(rest)
    except ThinkError as error:
        sys.stderr.write(f"think-vllm: error: {error}\n")
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
