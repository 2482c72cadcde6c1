"""Triton kernels: on a GPU if there is one, else in Triton's interpreter (tests/conftest.py)."""

import pytest
import torch
import triton


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")
