"""Fixtures and settings for all tests."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# No test may reach a model hub, nor report usage. Before anything imports vLLM.
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}.items():
    os.environ.setdefault(name, value)

# Without a GPU, Triton kernels run in Triton's interpreter. Triton decides this while it is
# imported, which whatever test comes first may do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def recall_model() -> Path:
    """Directory of the bundled model."""
    return REPOSITORY / "models" / "tiny-recall"


@pytest.fixture(autouse=True)
def vllm_logs_to_open_streams() -> Iterator[None]:
    """Take vLLM's log away from a test's captured output, which is closed behind the test.

    Each engine configuration that vLLM makes lets it log to what is standard output then.
    """
    yield
    for handler in logging.getLogger("vllm").handlers:
        if type(handler) is logging.StreamHandler:  # not those of pytest
            handler.stream = sys.stdout  # setStream() would flush the closed one
