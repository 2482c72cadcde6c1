"""LoRA: base model and two adapters at the same time, each against a model with it merged."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.conftest import Serve
from tests.support import checks
from tests.support.adapters import make_adapter, merge_adapter
from tests.support.checks import EAGER, TOLERANCE
from tests.support.models import make_llama
from tests.support.reference import Reference, Thinning
from tests.support.served import Completion
from tests.support.server import Server

pytestmark = [pytest.mark.e2e, pytest.mark.extended]


class Adapted:
    """A model, the same with each of two adapters merged into it, and what a server needs."""

    def __init__(self, folder: Path) -> None:
        self.base = make_llama(folder / "base")
        self.references = {str(self.base): Reference(self.base)}
        modules = []
        for seed, name in enumerate(("first", "second"), start=1):
            adapter = make_adapter(folder / name, self.base, seed)
            merged = merge_adapter(folder / f"{name}-merged", self.base, adapter)
            self.references[name] = Reference(merged)
            modules.append(f"{name}={adapter}")
        # One slot more than adapters: on CPUs vLLM 0.32 gives requests of the base model, where
        # they share a batch with others, the adapter in the last slot, and an empty one is zero.
        self.arguments = ["--enable-lora", "--max-loras", "3", "--max-lora-rank", "8"]
        self.arguments += ["--lora-modules", *modules]

    def ask(
        self, server: Server, prompts: list[list[int]], num_tokens: int
    ) -> dict[str, list[Completion]]:
        """Ask all of them all prompts at once: whoever got another's blocks would answer as it."""
        asked = [(name, prompt) for prompt in prompts for name in self.references]

        def ask(request: tuple[str, list[int]]) -> Completion:
            name, prompt = request
            return server.complete(prompt, num_tokens, model=name, frequency_penalty=2.0)

        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(ask, asked))
        found: dict[str, list[Completion]] = {name: [] for name in self.references}
        for (name, _), answer in zip(asked, answers, strict=True):
            found[name].append(answer)
        return found


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return Adapted(tmp_path_factory.mktemp("adapted"))


def test_adapters_and_base_model_in_one_batch(serve: Serve, adapted: Adapted) -> None:
    plan, arguments = checks.plan_served(128, kv_channel_prune=0.5, kv_prefix_cache="dense")
    # In chunks; and --disable-log-stats, which takes the statistics out of the scheduler.
    chunks = ("--max-num-batched-tokens", "256", "--disable-log-stats")
    server = serve(*EAGER, *arguments, *adapted.arguments, *chunks, model=adapted.base)
    prompts = checks.random_prompts([40, plan.span_tokens + 32, 700])
    # Some 250 tokens more: spans fill while decoding, too.
    answers = adapted.ask(server, prompts, plan.span_tokens + 60)
    thinning = Thinning.of(plan)
    for name, reference in adapted.references.items():
        own = answers[name]
        checks.assert_equal(reference, prompts, own, thinning)
        # The comparison would notice another adapter, and keys that are not pruned.
        for other in adapted.references.values():
            if other is not reference:
                checks.assert_unequal(other, prompts, own, thinning)
        checks.assert_unequal(reference, prompts, own, None)


def test_adapters_with_codes(serve: Serve, adapted: Adapted) -> None:
    plan, arguments = checks.plan_served(128, kv_channel_prune=0.5, kv_quant="kivi4")
    server = serve(*EAGER, *arguments, *adapted.arguments, model=adapted.base)
    prompts = checks.random_prompts([plan.span_tokens + 32, 700])
    answers = adapted.ask(server, prompts, plan.span_tokens // 2)
    thinning = Thinning.of(plan)
    for name, reference in adapted.references.items():
        for prompt, answer in zip(prompts, answers[name], strict=True):
            # A key between two codes may get the other one: few tokens differ by more.
            served = checks.differences(reference, prompt, answer, thinning)
            assert served.median() < 10 * TOLERANCE, (name, len(prompt))
            for other in adapted.references.values():
                if other is not reference:
                    others = checks.differences(other, prompt, answer, thinning)
                    assert others.median() > 100 * TOLERANCE
            dense = checks.differences(reference, prompt, answer, None)
            assert dense.median() > 100 * TOLERANCE
