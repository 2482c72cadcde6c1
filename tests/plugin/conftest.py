"""Fixtures of the plugin's tests."""

import pytest


@pytest.fixture
def inspect_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let vLLM look at a model's class in this process: another one takes 10 seconds a family."""
    monkeypatch.setattr(
        "vllm.model_executor.models.registry._run_in_subprocess", lambda look: look()
    )
