"""An engine at a time, in a process of their own."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import Engine, engine_process

#: What starts one.
Load = Callable[..., Engine]


@pytest.fixture(scope="session")
def process() -> Iterator[ProcessPoolExecutor]:
    with engine_process() as process:
        yield process


@pytest.fixture(scope="session")
def load(process: ProcessPoolExecutor, recall_model: Path) -> Load:
    """Load an engine. It replaces the one before."""

    def start(*arguments: str, model: Path = recall_model, **options: Any) -> Engine:
        return Engine(process, model, arguments, **options)

    return start
