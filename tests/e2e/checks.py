"""Comparing a server's log-probabilities with the reference."""

import random
from collections.abc import Sequence

from tests.support.reference import Pruning, Reference
from tests.support.server import Completion, Server

#: Float32: two implementations that sum in different orders differ by some 1e-6 here; one wrong
#: channel of one span shows as 1e-3 and more.
TOLERANCE = 1e-4
FLOAT32 = ("--dtype", "float32", "--max-num-seqs", "16")
EAGER = (*FLOAT32, "--enforce-eager")


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random words of the bundled model's vocabulary, whose first 4 ids are special."""
    rng = random.Random(seed)
    return [[rng.randrange(4, 384) for _ in range(length)] for length in lengths]


def worst_differences(
    reference: Reference,
    prompts: Sequence[list[int]],
    completions: Sequence[Completion],
    pruning: Pruning | None,
) -> dict[int, float]:
    """Largest difference of a log-probability, by prompt length."""
    differences = {}
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = reference.logprobs(prompt, completion.tokens, pruning)
        differences[len(prompt)] = max(
            abs(a - b) for a, b in zip(expected, completion.logprobs, strict=True)
        )
    return differences


def check_served(
    server: Server,
    reference: Reference,
    lengths: Sequence[int],
    max_tokens: Sequence[int],
    pruning: Pruning | None,
    together: bool = True,
) -> None:
    """Complete prompts of these lengths and compare every log-probability."""
    prompts = random_prompts(lengths)
    if together:
        completions = server.complete_all(prompts, max_tokens)
    else:
        completions = [
            server.complete(prompt, count)
            for prompt, count in zip(prompts, max_tokens, strict=True)
        ]
    differences = worst_differences(reference, prompts, completions, pruning)
    assert max(differences.values()) < TOLERANCE, differences
