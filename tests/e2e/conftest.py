"""Servers that end-to-end tests share: a start costs 20 seconds and more."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import make_exact_llama
from tests.support.reference import Reference
from tests.support.server import Server

#: What starts one.
Serve = Callable[..., Server]


@pytest.fixture(scope="session")
def exact_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose codes are the reference's; see there."""
    return make_exact_llama(tmp_path_factory.mktemp("exact"))


@pytest.fixture(scope="session")
def exact_reference(exact_model: Path) -> Reference:
    return Reference(exact_model)


@pytest.fixture(scope="module")
def serve(recall_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Start a server of this module. The next one replaces it; the module's end stops it."""
    with ExitStack() as stack:

        def start(*arguments: str, model: Path = recall_model, **options: Any) -> Server:
            stack.close()
            log = tmp_path_factory.mktemp("server") / "server.log"
            return stack.enter_context(Server(model, arguments, log, **options))

        yield start
