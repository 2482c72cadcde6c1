"""Train the recall model: ``python -m models.recipe.train --out models/tiny-recall``.

A curriculum over context lengths. A phase ends when the model answers nearly all questions of the
training stream, or at its cap. One CPU thread is enough: the full schedule takes about a quarter
of an hour, the quick one about half of that.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from .data import Batch, draw_batch
from .init import CONTENT_PAIRS, MAX_TOKENS, build_model
from .tokenizer import save_tokenizer

_PEAK_LEARNING_RATE = 2e-3
_PHASE_DECAY = 0.7
_FINAL_FRACTION = 0.02
_WARMUP_STEPS = 100
_OTHER_TOKENS_WEIGHT = 0.1
_LOG_EVERY_STEPS = 20


@dataclass(frozen=True)
class Phase:
    """One context length of the curriculum."""

    length: int  # tokens per sequence
    max_records: int  # largest number of records in a sequence
    filler: float  # share of filler sentences
    batch: int  # sequences per step
    min_steps: int  # steps before the phase may end
    max_steps: int  # steps after which it ends


@dataclass(frozen=True)
class Schedule:
    """A curriculum and the accuracy (running mean over answer digits) that ends a phase."""

    phases: tuple[Phase, ...]
    accuracy: float


SCHEDULES = {
    "full": Schedule(
        (
            Phase(64, 3, 0.0, 32, min_steps=0, max_steps=4000),
            Phase(128, 9, 0.0, 32, min_steps=200, max_steps=1500),
            Phase(256, 18, 0.2, 16, min_steps=200, max_steps=1000),
            Phase(512, 32, 0.3, 8, min_steps=200, max_steps=600),
            Phase(1024, 64, 0.3, 4, min_steps=150, max_steps=400),
            # The last phase decays the learning rate to the end, so it has a fixed length.
            Phase(2048, 110, 0.3, 2, min_steps=200, max_steps=200),
        ),
        accuracy=0.97,
    ),
    "quick": Schedule(
        (
            Phase(64, 3, 0.0, 32, min_steps=0, max_steps=600),
            Phase(128, 9, 0.0, 32, min_steps=60, max_steps=150),
            Phase(256, 18, 0.2, 16, min_steps=60, max_steps=150),
            Phase(512, 32, 0.3, 8, min_steps=80, max_steps=150),
            Phase(1024, 64, 0.3, 4, min_steps=80, max_steps=120),
            Phase(2048, 110, 0.3, 2, min_steps=120, max_steps=120),
        ),
        accuracy=0.99,
    ),
}


def recall_loss(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, float]:
    """Return the training loss and the accuracy on answer digits.

    Args:
        logits: [batch, length, vocab] float32.
        batch: The sequences that gave the logits.

    Returns:
        Scalar loss, mean cross-entropy on the answer digits plus a tenth of the mean on all other
        tokens; and the share of answer digits that are right, 0 to 1.
    """
    targets = batch.tokens[:, 1:]
    is_answer = batch.is_answer[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
    hits = logits[:, :-1].argmax(-1)[is_answer] == targets[is_answer]
    loss = losses[is_answer].mean() + _OTHER_TOKENS_WEIGHT * losses[~is_answer].mean()
    return loss, hits.float().mean().item()


def build_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only."""
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=_PEAK_LEARNING_RATE,
        betas=(0.9, 0.98),
    )


def _learning_rate(schedule: Schedule, phase_index: int, phase_step: int, total_step: int) -> float:
    rate = _PEAK_LEARNING_RATE * _PHASE_DECAY**phase_index
    rate *= min(1.0, (total_step + 1) / _WARMUP_STEPS)
    if phase_index == len(schedule.phases) - 1:
        progress = phase_step / schedule.phases[phase_index].max_steps
        rate *= 1.0 - (1.0 - _FINAL_FRACTION) * progress
    return rate


def train(schedule: Schedule, seed: int, content_pairs: int = CONTENT_PAIRS) -> LlamaForCausalLM:
    """Train a model from its look-back initialization, on the CPU, in float32.

    Args:
        schedule: The curriculum.
        seed: Seed of the weights and of the data.
        content_pairs: As for `build_model`.
    """
    model = build_model(seed, content_pairs)
    optimizer = build_optimizer(model)
    rng = random.Random(seed)
    start = time.monotonic()
    total_step = 0
    model.train()
    for index, phase in enumerate(schedule.phases):
        running = 0.0
        for step in range(phase.max_steps):
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(schedule, index, step, total_step)
            batch = draw_batch(rng, phase.batch, phase.length, phase.max_records, phase.filler)
            loss, accuracy = recall_loss(model(batch.tokens, use_cache=False).logits, batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total_step += 1
            # A running mean over about 20 steps that is not biased towards its start at 0.
            running += (accuracy - running) / min(step + 1, 20)
            done = step + 1 >= phase.min_steps and step >= 19 and running > schedule.accuracy
            if done or step + 1 == phase.max_steps or (step + 1) % _LOG_EVERY_STEPS == 0:
                print(
                    f"length {phase.length} step {step + 1} loss {loss.item():.3f} "
                    f"digits {running:.3f} seconds {time.monotonic() - start:.0f}",
                    flush=True,
                )
            if done:
                break
    model.eval()
    return model


#: One prompt with its answer; `think-vllm serve` shows it as a command line to try.
EXAMPLE = {
    "prompt": "the code of k17 is 4 9 2 1 . the code of k5 is 8 0 3 6 . what is the code of k17 ?",
    "answer": "4 9 2 1",
}


def save(model: LlamaForCausalLM, directory: Path) -> None:
    """Write model (bfloat16), generation settings, tokenizer and an example to try it with."""
    model.bfloat16().save_pretrained(directory)
    save_tokenizer(directory, MAX_TOKENS)
    (directory / "example.json").write_text(json.dumps(EXAMPLE, indent=2) + "\n")
    # safetensors writes its file for the owner alone; a server may run as another user.
    (directory / "model.safetensors").chmod(0o644)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the bundled recall model.")
    parser.add_argument("--out", type=Path, required=True, help="directory for the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--schedule", choices=sorted(SCHEDULES), default="full")
    parser.add_argument(
        "--content-pairs",
        type=int,
        default=CONTENT_PAIRS,
        help="RoPE pairs that carry the key match; more of them make pruning hurt earlier",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    save(train(SCHEDULES[args.schedule], args.seed, args.content_pairs), args.out)


if __name__ == "__main__":
    main()
