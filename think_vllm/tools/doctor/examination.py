"""The examination: versions, patches, machine, model, plan, and a short generation."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from think_vllm.errors import FLAGS, ThinkError, end_of_output
from think_vllm.hooks.command_line import errors_raised
from think_vllm.hooks.engine import find_engine
from think_vllm.plan.summary import never_thin
from think_vllm.tools.doctor.comparison import Comparison, compare
from think_vllm.tools.doctor.finding import Finding, Level
from think_vllm.tools.doctor.machine import check_machine, check_versions
from think_vllm.tools.doctor.patches import check_patches
from think_vllm.tools.doctor.probe import ProbeJob, ProbeResult, parse_engine_args

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator, Sequence

    from think_vllm.hooks.engine import Engine
    from think_vllm.plan.planner import BlockPlan

LOG_LINES = 25


class Examination:
    """Of one model with one set of flags; `findings` ends with the first that rules it out."""

    def __init__(self, model: str, arguments: Sequence[str], generation: Namespace | None) -> None:
        self.model = model
        self.arguments = list(arguments)
        self.generation = generation
        self.engine: Engine | None = None
        self.prefix_caching = False
        self.runs: tuple[ProbeResult, ProbeResult] | None = None
        self.comparison: Comparison | None = None

    def findings(self) -> Iterator[Finding]:
        """Check one thing after the other.

        Raises:
            SystemExit: If vLLM's parser does not take the arguments.
        """
        parts = (
            (check_versions, check_patches),
            (check_machine,),
            (self._check_model,),
            (self._check_answers,),
        )
        for checks in parts:
            bad = False
            for finding in itertools.chain.from_iterable(check() for check in checks):
                bad = bad or finding.level is Level.BAD
                yield finding
            if bad:
                return

    def fields(self) -> dict[str, Any]:
        """Plan and comparison, JSON-ready."""
        fields: dict[str, Any] = {"model": self.model, "arguments": self.arguments}
        if self.engine is not None:
            fields["plan"] = self.engine.fields(self.prefix_caching)
        if self.comparison is not None:
            fields["comparison"] = {
                **vars(self.comparison),
                "perplexity_change": self.comparison.perplexity_change,
            }
        return fields

    def _check_model(self) -> Iterator[Finding]:
        engine_args = parse_engine_args(self.model, self.arguments)
        try:
            with errors_raised():
                vllm_config = engine_args.create_engine_config()
            engine = find_engine(vllm_config)
            if engine is None:
                raise ThinkError(f"no thin blocks: one of {FLAGS} is needed")
        except (ThinkError, OSError, ValueError) as error:
            yield Finding(Level.BAD, "model", " ".join(str(error).split()))
            return
        model_config = vllm_config.model_config
        yield Finding(Level.GOOD, "model", f"{self.model}: {', '.join(model_config.architectures)}")
        if engine.plan is None and engine.static is None:
            yield Finding(Level.BAD, "plan", "no channel of this model would go; raise the ratio")
            return
        self.engine = engine
        self.prefix_caching = vllm_config.cache_config.enable_prefix_caching
        for line in engine.summary(self.prefix_caching):
            yield Finding(Level.GOOD, "plan", line)
        longest = model_config.max_model_len
        if engine.plan is None:
            yield from self._check_generation(longest)
        else:
            yield from self._check_lengths(engine.plan, longest)

    def _check_lengths(self, plan: BlockPlan, longest: int) -> Iterator[Finding]:
        if never := never_thin(plan, longest):
            yield Finding(Level.BAD, "plan", *never)
            return
        yield Finding(
            Level.GOOD,
            "plan",
            f"requests of the longest length, {longest} tokens, take "
            f"1/{plan.effective_multiple(longest):.2f} of the memory",
        )
        too_long = list(self._check_generation(longest))
        yield from too_long
        generation = self.generation
        if generation is None or too_long:
            return
        if plan.rule.prompt_spans(generation.prompt_tokens) == 0:
            yield Finding(
                Level.BAD,
                "generation",
                f"no span of a prompt of {generation.prompt_tokens} tokens becomes thin; give "
                f"--prompt-tokens {plan.span_tokens + plan.config.kv_recent_window} or more",
            )

    def _check_generation(self, longest: int) -> Iterator[Finding]:
        generation = self.generation
        if generation is not None and generation.prompt_tokens + generation.new_tokens > longest:
            yield Finding(
                Level.BAD,
                "generation",
                f"{generation.prompt_tokens} + {generation.new_tokens} tokens exceed the model's "
                f"{longest}; give less --prompt-tokens or --new-tokens",
            )

    def _check_answers(self) -> Iterator[Finding]:
        generation = self.generation
        if generation is None:
            yield Finding(Level.NOTE, "answers", "not compared (--no-generation)")
            return
        job = ProbeJob(
            arguments=self.arguments,
            model=self.model,
            dense=True,
            text=generation.text,
            num_prompts=generation.num_prompts,
            prompt_tokens=generation.prompt_tokens,
            new_tokens=generation.new_tokens,
            out=Path("result.json"),
        )
        try:
            dense = run_probe(job)
            thin = run_probe(
                job.model_copy(
                    update={"dense": False, "prompts": dense.prompts, "forced": dense.tokens}
                )
            )
        except ThinkError as error:
            yield Finding(Level.BAD, "answers", str(error))
            return
        self.runs = dense, thin
        comparison = self.comparison = compare(dense, thin)
        reasons = comparison.reasons_against(
            generation.max_perplexity_change, generation.min_agreement
        )
        yield Finding(
            Level.NOTE if reasons else Level.GOOD,
            "answers",
            f"{comparison.tokens} tokens behind {len(dense.prompts)} prompts: perplexity on the "
            f"dense answers {comparison.perplexity_change:+.2%}, log-probabilities differ by up to "
            f"{comparison.largest_difference:.3f}, the likeliest token is the same in "
            f"{comparison.agreement:.1%}",
        )
        for reason in reasons:
            yield Finding(Level.BAD, "answers", f"{reason}; prune less, or give values more bits")


def run_probe(job: ProbeJob) -> ProbeResult:
    """Run a job in a process of its own; its output is shown only if it fails.

    Raises:
        ThinkError: With the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, file = Path(folder) / "result.json", Path(folder) / "job.json"
        file.write_text(job.model_copy(update={"out": out}).model_dump_json(), encoding="utf-8")
        process = subprocess.run(
            [sys.executable, "-m", "think_vllm.tools.doctor.probe", str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        if process.returncode != 0:
            tail = end_of_output(process.stdout, LOG_LINES)
            which = "without the flags" if job.dense else "with the flags"
            raise ThinkError(f"the engine {which} failed; the end of its output:\n{tail}")
        return ProbeResult.model_validate(json.loads(out.read_text(encoding="utf-8")))
