"""The parser of `vllm serve`, with our flags."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from vllm.utils.argparse_utils import FlexibleArgumentParser

from think_vllm.hooks.moved import moved
from think_vllm.plugin import register

Parse = Callable[[Sequence[str]], argparse.Namespace]


@pytest.fixture(scope="package")
def parse() -> Parse:
    """Parse what follows `vllm serve`; an unknown flag ends the test."""
    register()
    parser: Any = moved("make_arg_parser")(FlexibleArgumentParser())

    def run(arguments: Sequence[str]) -> argparse.Namespace:
        return parser.parse_args(list(arguments))

    return run
