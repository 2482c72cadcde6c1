"""What ``hooks/model_runner.py`` reads of vLLM's two model runners, and nothing else of them."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.triton.expected import Request
from think_vllm.hooks import model_runner
from think_vllm.hooks.installation import wrap_method


class RunnerV1:
    """Stands for ``vllm.v1.worker.gpu_model_runner.GPUModelRunner``."""

    def __init__(self, config: Any) -> None:
        self.vllm_config = config
        self._told: set[str] = set()

    def _update_states(self, scheduler_output: Any) -> None:
        """Where the runner is told of requests that are new; those that resume are not."""

    def _determine_batch_execution_and_padding(
        self, *, max_num_scheduled_tokens: int, force_uniform_decode: bool | None = None
    ) -> bool:
        if force_uniform_decode is not None:
            return force_uniform_decode
        return max_num_scheduled_tokens == 1

    def admit(self, name: str) -> None:
        """Nothing: requests are known until they finish."""

    def forget(self, name: str) -> None:
        """As ``admit``."""

    def announce(self, batch, counts, requests, rows) -> bool:
        """Show the wrapped method a batch; whether it may run as a graph."""
        self.requests = requests
        new = [_admitted(request) for request in batch if request.name not in self._told]
        self._told.update(request.name for request in batch)
        self._update_states(SimpleNamespace(scheduled_new_reqs=new))
        self.input_batch = SimpleNamespace(
            req_ids=[request.name for request in batch],
            num_reqs=len(batch),
            # Rows behind the batch hold what earlier batches have left.
            num_prompt_tokens=np.array([r.prompt_len for r in batch] + [999], np.int32),
            num_computed_tokens_cpu=np.array([r.computed for r in batch] + [3], np.int32),
            block_table=[SimpleNamespace(get_numpy_array=lambda: rows)],
        )
        return self._determine_batch_execution_and_padding(max_num_scheduled_tokens=max(counts))

    def announce_dummy(self, tokens: int) -> None:
        """Show it a run without requests."""
        self._determine_batch_execution_and_padding(
            max_num_scheduled_tokens=tokens, force_uniform_decode=False
        )


class RunnerV2:
    """Stands for ``vllm.v1.worker.gpu.model_runner.GPUModelRunner``."""

    def __init__(self, config: Any) -> None:
        self.vllm_config = config
        self.rows: list[str] = []  # of its table of requests

    def gather_batch_req_state(self, scheduler_output: Any, dummy_run: bool) -> Any:
        batch = scheduler_output.batch
        return (None if dummy_run else batch), (1 if batch.uniform else None)

    def admit(self, name: str) -> None:
        """Give a request a row, unless it has one."""
        if name not in self.rows:
            if "" in self.rows:
                self.rows[self.rows.index("")] = name
            else:
                self.rows.append(name)

    def forget(self, name: str) -> None:
        """Take a request's row; preempted ones are admitted again."""
        if name in self.rows:
            self.rows[self.rows.index(name)] = ""

    def announce(self, batch, counts, requests, rows) -> bool:
        """As that of V1. This runner has no rows of blocks on the host."""
        table = {name: row for row, name in enumerate(self.rows) if name}
        lens = [requests[name].prompt_len if name else 0 for name in self.rows]
        self.req_states = SimpleNamespace(
            prompt_len=SimpleNamespace(np=np.array(lens, np.int32)), req_id_to_index=table
        )
        state = SimpleNamespace(
            req_ids=[request.name for request in batch],
            idx_mapping_np=np.array([table[request.name] for request in batch]),
            has_prefill=any(r.computed < r.prefill_len for r in batch),
            uniform=max(counts) == 1,
        )
        new = [_admitted(request) for request in batch if request.admitted]
        output = SimpleNamespace(batch=state, scheduled_new_reqs=new)
        _, tokens = self.gather_batch_req_state(output, False)
        return bool(tokens == 1)

    def announce_dummy(self, tokens: int) -> None:
        """As that of V1."""
        batch = SimpleNamespace(uniform=False)
        self.gather_batch_req_state(SimpleNamespace(batch=batch), True)


def _admitted(request: Request) -> Any:
    """What vLLM's scheduler tells of a request that it admits."""
    return SimpleNamespace(
        req_id=request.name,
        block_ids=(list(request.blocks),),
        num_computed_tokens=request.computed,
        sampling_params=SimpleNamespace(extra_args=request.extra_args),
    )


def make_runner(version: int, config: Any) -> RunnerV1 | RunnerV2:
    """The runner of an engine."""
    return RunnerV1(config) if version == 1 else RunnerV2(config)


for runner, name, wrapper in (
    (RunnerV1, "_update_states", model_runner._admit_v1),
    (RunnerV1, "_determine_batch_execution_and_padding", model_runner._observe_v1),
    (RunnerV2, "gather_batch_req_state", model_runner._observe_v2),
):
    wrap_method(runner, name, wrapper, engines_only=True)
