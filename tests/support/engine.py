"""VLLM's engine without a server, in one process for all tests.

The engine, its scheduler and its worker are the ones behind the server, and so are the arguments.
Most of a server's start is imports: here they come once, and an engine starts in 2 seconds, not 20.
The process is not that of the tests, as vLLM and our hooks change theirs for good.
"""

import gc
import io
import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.support.served import GREEDY, KV_CACHE_BYTES, Completion, Served
from tests.support.server import offline_environment


class Engine(Served):
    """The engine that was loaded last, in the process of ``engine_process``."""

    def __init__(
        self,
        process: ProcessPoolExecutor,
        model: Path,
        arguments: Sequence[str],
        kv_cache_bytes: int = KV_CACHE_BYTES,
    ) -> None:
        self._process = process
        arguments = [*arguments, "--kv-cache-memory-bytes", str(kv_cache_bytes)]
        self._log: str = process.submit(_load, str(model), arguments).result()

    def complete(self, prompt: list[int], max_tokens: int, **options: Any) -> Completion:
        return self.complete_all([prompt], [max_tokens], **options)[0]

    def complete_all(
        self, prompts: Sequence[list[int]], max_tokens: Sequence[int], **options: Any
    ) -> list[Completion]:
        return self._process.submit(_complete, prompts, max_tokens, options).result()

    def log_text(self) -> str:
        """What think-vllm logged while the engine started."""
        return self._log

    def max_model_len(self) -> int:
        return self._process.submit(_max_model_len).result()

    def metrics_text(self) -> str:
        return self._process.submit(_metrics_text).result()


@contextmanager
def engine_process() -> Iterator[ProcessPoolExecutor]:
    """A process for engines, one after the other."""
    with patch.dict(os.environ, offline_environment(), clear=True):
        process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        process.submit(int).result()  # it has its environment
    with process:
        yield process
        process.submit(_stop).result()


# -- In that process -------------------------------------------------------------------------

_llm: Any = None


def _load(model: str, arguments: list[str]) -> str:
    """Start an engine in place of the one before; return what think-vllm logged."""
    global _llm
    _stop()
    _override_kernels()
    # vLLM collects garbage eight times in the life of an engine, among all that was ever imported.
    # Here once, of the engine before; the rest is out of the way from then on.
    gc.collect()
    gc.freeze()
    from vllm import LLM
    from vllm.logger import configure_logging_if_needed

    from think_vllm.tools.doctor.probe import parse_engine_args

    engine_args = parse_engine_args(model, arguments)
    # Else the first engine does, and takes our handler away.
    configure_logging_if_needed(engine_args.create_logging_config())
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logger = logging.getLogger("vllm.think_vllm")
    # A server tells its plan in its first process alone: in children the level is DEBUG.
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    try:
        _llm = LLM.from_engine_args(engine_args)
    finally:
        logger.removeHandler(handler)
    return log.getvalue()


def _stop() -> None:
    """Free the engine's memory."""
    global _llm
    if _llm is None:
        return
    from vllm.distributed import cleanup_dist_env_and_memory

    with patch("gc.collect"):  # see ``_load``
        _llm.llm_engine.engine_core.shutdown()
        _llm = None
        cleanup_dist_env_and_memory()


def _complete(
    prompts: Sequence[list[int]], max_tokens: Sequence[int], options: dict[str, Any]
) -> list[Completion]:
    from vllm import SamplingParams

    params = [SamplingParams(max_tokens=count, **GREEDY, **options) for count in max_tokens]
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [_completion_of(done) for done in _llm.generate(asked, params, use_tqdm=False)]


def _completion_of(done: Any) -> Completion:
    [answer] = done.outputs
    steps = zip(answer.token_ids, answer.logprobs, strict=True)
    return Completion(
        list(answer.token_ids), [step[token].logprob for token, step in steps], answer.text
    )


def _max_model_len() -> int:
    return _llm.model_config.max_model_len


def _metrics_text() -> str:
    import prometheus_client

    return prometheus_client.generate_latest().decode()


@cache
def _override_kernels() -> None:
    """Let vLLM's CPU worker replace Triton's kernels now, and not again with every engine.

    It looks for them in all modules, and breaks on llvmlite's library, which claims to have any
    attribute and is there as soon as Numba is.
    """
    from vllm.platforms import current_platform

    hidden = {name: module for name, module in sys.modules.items() if name.startswith("llvmlite")}
    for name in hidden:
        del sys.modules[name]
    try:
        current_platform.register_triton_kernel_overrides()
    finally:
        sys.modules.update(hidden)
    type(current_platform).register_triton_kernel_overrides = staticmethod(lambda: None)
