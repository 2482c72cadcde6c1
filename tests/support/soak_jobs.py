"""What a soak sends: requests of all lengths, some of which are abandoned, or must be rejected."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: Ids of the bundled tokenizer's words; the first 4 are special.
WORDS = range(4, 384)
#: Tokens of the texts that some prompts begin with, as chats begin with a system prompt.
SHARED_PREFIXES = (70, 330, 640, 1050)


@dataclass(frozen=True)
class Job:
    """One request: what is posted besides the model name, and the status of the answer.

    The client of a stream hangs up after ``leaves_after`` tokens, 0 for the first line of the
    answer's head; of another, if there is no answer after ``patience_s``. A ``shared`` prompt
    begins as those of other requests do.
    """

    body: dict[str, Any] | str
    status: int = 200
    stream: bool = False
    leaves_after: int | None = None
    patience_s: float | None = None
    shared: bool = False

    @property
    def prompt(self) -> list[int]:
        """Token ids; only of requests that are served."""
        assert isinstance(self.body, dict)
        return self.body["prompt"]

    @property
    def max_tokens(self) -> int:
        """Tokens of the whole answer; only of requests that are served."""
        assert isinstance(self.body, dict)
        return self.body["max_tokens"]

    @property
    def frequency_penalty(self) -> float:
        """What vLLM subtracts for each time that a token was chosen, but in log-probabilities."""
        assert isinstance(self.body, dict)
        return self.body["frequency_penalty"]

    @property
    def leaves(self) -> bool:
        """Whether the client may hang up before the answer is complete."""
        return self.leaves_after is not None or self.patience_s is not None


def rejected_jobs(max_model_len: int) -> list[Job]:
    """One request of each kind that a server must reject."""
    fine: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 3}
    wrong: list[tuple[int, dict[str, Any]]] = [
        (400, {"prompt": [9] * (max_model_len + 1)}),
        (400, {"prompt": [10**6]}),
        (400, {"max_tokens": -1}),
        (400, {"temperature": -1}),
        (400, {"top_p": 7}),
        (400, {"logprobs": 1000}),
        (400, {"n": 0}),
        (404, {"model": "nobody"}),
    ]
    jobs = [Job({**fine, **change}, status) for status, change in wrong]
    return [*jobs, Job('{"prompt": [5, 6', 400), Job("[]", 400)]


def draw_jobs(
    seed: int,
    count: int,
    max_model_len: int,
    longest_answer: int = 600,
    frequency_penalty: float = 0.0,
) -> list[Job]:
    """Draw requests, the same ones for the same arguments.

    Prompts have 1 token to most of ``max_model_len``, half of them log-uniform; one in five is
    abandoned, and one in twenty wrong. A model with random weights goes round in circles without a
    ``frequency_penalty``.
    """
    rng = random.Random(f"soak/{seed}/{count}/{max_model_len}")
    prefixes = [words(rng, min(n, max_model_len // 2)) for n in SHARED_PREFIXES]
    wrong = rejected_jobs(max_model_len)
    jobs = []
    for index in range(count):
        if index % 20 == 19:
            # All kinds in turn.
            jobs.append(wrong[index // 20 % len(wrong)])
        else:
            options = {"frequency_penalty": frequency_penalty}
            jobs.append(_draw_served(rng, prefixes, max_model_len, longest_answer, options))
    return jobs


def words(rng: random.Random, count: int) -> list[int]:
    """Random words."""
    return rng.choices(WORDS, k=count)


def _draw_served(
    rng: random.Random,
    prefixes: Sequence[list[int]],
    max_model_len: int,
    longest_answer: int,
    options: dict[str, Any],
) -> Job:
    shared = rng.random() < 0.25
    prefix = rng.choice(prefixes) if shared else []
    answer = log_uniform(rng, longest_answer)
    room = max_model_len - len(prefix) - answer
    own = log_uniform(rng, room) if rng.random() < 0.5 else rng.randint(1, room)
    body: dict[str, Any] = {
        "prompt": prefix + words(rng, own),
        "max_tokens": answer,
        "temperature": 0,
        **options,
        "logprobs": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    if rng.random() < 0.8:
        stream = rng.random() < 0.5
        return Job({**body, "stream": stream}, stream=stream, shared=shared)
    # Whoever leaves should leave something undone.
    body["max_tokens"] = min(max(answer, 60), max_model_len - len(body["prompt"]))
    if rng.random() < 0.3:
        return Job(body, patience_s=rng.uniform(0.0, 0.5), shared=shared)
    after = 0 if rng.random() < 0.3 else rng.randint(1, body["max_tokens"])
    return Job({**body, "stream": True}, stream=True, leaves_after=after, shared=shared)


def log_uniform(rng: random.Random, largest: int) -> int:
    """A whole number from 1 to ``largest``, whose logarithm is about uniform."""
    return min(largest, int(math.exp(rng.uniform(0.0, math.log(largest + 1)))))
