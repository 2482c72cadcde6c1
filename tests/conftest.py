"""Fixtures and settings for all tests."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
from hypothesis import HealthCheck

# No test may reach a model hub, nor report usage. Before anything imports vLLM.
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}.items():
    os.environ.setdefault(name, value)

# Workers beside each other have a core each.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Without a GPU, Triton kernels run in Triton's interpreter. Triton decides this while it is
# imported, which whatever test comes first may do.
import torch  # noqa: E402  (behind what it reads while it is imported)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest_plugins = ["tests.support.tiers"]

# Examples are the same ones in every run, and take as long as a busy machine needs.
hypothesis.settings.register_profile(
    "same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
hypothesis.settings.load_profile("same")

if TYPE_CHECKING:
    from tests.support.prefix_reference import PrefixReference
    from tests.support.reference import Reference

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def recall_model() -> Path:
    """Directory of the bundled model."""
    return REPOSITORY / "models" / "tiny-recall"


@pytest.fixture(scope="session")
def recall_reference(recall_model: Path) -> "Reference":
    """The bundled model in plain transformers, float32."""
    from tests.support.reference import Reference

    return Reference(recall_model)


@pytest.fixture(scope="session")
def prefix_reference(recall_model: Path) -> "PrefixReference":
    """The same for prompts whose prefix was hit, or which were pruned chunk by chunk."""
    from tests.support.prefix_reference import PrefixReference

    return PrefixReference(recall_model)


@pytest.fixture(autouse=True)
def vllm_logs_to_open_streams() -> Iterator[None]:
    """Take vLLM's log away from a test's captured output, which is closed behind the test.

    Each engine configuration that vLLM makes lets it log to what is standard output then.
    """
    yield
    for handler in logging.getLogger("vllm").handlers:
        if type(handler) is logging.StreamHandler:  # not those of pytest
            handler.stream = sys.stdout  # setStream() would flush the closed one
