"""What is sent to a server: lengths, shared prefixes, how many at a time or how often.

A scenario is a YAML file. It knows neither servers nor results.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from think_vllm.errors import ThinkError

FOLDER = Path(__file__).parent / "scenarios"
MAX_TOKENS = 1_000_000


@dataclass(frozen=True)
class LoadPoint:
    """One load: requests that are kept in flight, or sent per second."""

    num_prompts: int  # requests in all
    concurrency: int | None = None  # requests in flight at most; None if they are sent at a rate
    #: Requests sent per second on average; None if concurrency limits them.
    request_rate: float | None = None

    def __str__(self) -> str:
        if self.concurrency is not None:
            return f"{self.concurrency} at a time"
        return f"{self.request_rate:g} per second"


class Scenario(BaseModel):
    """A load, as its YAML file states it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="Lower case, as its file.")
    description: str = Field(min_length=1, description="One sentence for a report.")
    dataset: Literal["random", "prefix_repetition"] = Field(
        default="random",
        description="vLLM's dataset: random prompts, or random ones behind shared prefixes.",
    )
    prompt_tokens: int = Field(
        ge=1, le=MAX_TOKENS, description="Tokens of a prompt, a shared prefix included."
    )
    output_tokens: int = Field(
        ge=2, le=MAX_TOKENS, description="Tokens that are generated for each prompt."
    )
    length_spread: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Lengths of prompts and answers are even between 1 - this and 1 + this times "
        "the above. Only with the random dataset.",
    )
    prefix_tokens: int = Field(
        default=0,
        ge=0,
        le=MAX_TOKENS,
        description="Leading tokens of a prompt that others share. Only with prefix_repetition.",
    )
    num_prefixes: int = Field(default=1, ge=1, le=100_000, description="Different shared prefixes.")
    prefix_caching: bool = Field(
        default=False,
        description="Whether servers cache prefixes. Prompts of the random dataset share some by "
        "chance if the vocabulary is small.",
    )
    concurrency: tuple[int, ...] = Field(
        default=(), description="Requests in flight at most, one load after the other."
    )
    request_rate: tuple[float, ...] = Field(
        default=(), description="Requests per second, one load after the other."
    )
    burstiness: float = Field(
        default=1.0,
        gt=0.0,
        le=100.0,
        description="Shape of the gamma distribution of the gaps between requests that are sent at "
        "a rate: 1 is a Poisson process, less comes in bursts.",
    )
    num_prompts: int = Field(
        default=256,
        ge=1,
        le=1_000_000,
        description="Requests of a load at most; more if more are to be in flight.",
    )
    prompts_per_place: int = Field(
        default=4,
        ge=1,
        le=1000,
        description="Requests for each one in flight, as far as num_prompts goes.",
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if bool(self.concurrency) == bool(self.request_rate):
            raise ValueError("give either concurrency or request_rate, as a list of numbers")
        if any(value < 1 for value in self.concurrency):
            raise ValueError("concurrency has a number below 1")
        if any(not 0 < value < math.inf for value in self.request_rate):
            raise ValueError("request_rate has a number that is not above 0, or infinite")
        if self.dataset == "random" and self.prefix_tokens:
            raise ValueError("prefix_tokens needs dataset: prefix_repetition")
        if self.dataset == "prefix_repetition":
            if not 0 < self.prefix_tokens < self.prompt_tokens:
                raise ValueError(
                    "prefix_repetition needs prefix_tokens above 0 and below prompt_tokens"
                )
            if self.length_spread:
                raise ValueError("length_spread needs dataset: random")
            fewest = min(point.num_prompts for point in self.points())
            if fewest < self.num_prefixes:
                raise ValueError(
                    f"num_prefixes is {self.num_prefixes}, and a load has {fewest} requests; each "
                    "prefix needs one: raise prompts_per_place and num_prompts (--num-prompts, or "
                    "--concurrency), or lower num_prefixes"
                )
        return self

    def points(self) -> list[LoadPoint]:
        """The loads, in their order."""
        if self.request_rate:
            return [LoadPoint(self.num_prompts, request_rate=rate) for rate in self.request_rate]
        return [
            LoadPoint(
                max(places, min(self.num_prompts, places * self.prompts_per_place)),
                concurrency=places,
            )
            for places in self.concurrency
        ]

    @property
    def longest_request(self) -> int:
        """Tokens of the longest prompt and its answer."""
        lengths = (self.prompt_tokens, self.output_tokens)
        return sum(math.ceil(length * (1 + self.length_spread)) for length in lengths)

    @property
    def most_in_flight(self) -> int:
        """Requests that can be in flight at once."""
        return max(point.concurrency or point.num_prompts for point in self.points())

    def check_length(self, max_model_len: int) -> None:
        """Reject requests that the model has no room for.

        Raises:
            ThinkError: If the longest one has more tokens than the model takes.
        """
        if self.longest_request > max_model_len:
            raise ThinkError(
                f"scenario {self.name}: its longest request has {self.longest_request} tokens "
                f"(prompt {self.prompt_tokens}, output {self.output_tokens}, spread "
                f"{self.length_spread:g}), the server takes {max_model_len} (max_model_len); "
                "choose a scenario with shorter ones, or copy its file and shorten it there"
            )

    def changed(self, **changes: Any) -> "Scenario":
        """The same with some fields replaced, checked again.

        Raises:
            ThinkError: If what comes out makes no sense.
        """
        return _validated({**self.model_dump(), **changes}, f"scenario {self.name}")


def known_scenarios() -> list[str]:
    """Names of the scenarios that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_scenario(name: str) -> Scenario:
    """Read a scenario of the package, or a file.

    Args:
        name: One of ``known_scenarios()``, or a path that ends in ``.yaml`` or ``.yml``.

    Raises:
        ThinkError: If there is none, or it is wrong.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ThinkError(
            f"bench: there is no scenario {name!r}; there are {', '.join(known_scenarios())}, or "
            "give the path of a YAML file"
        )
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ThinkError(
            f"scenario {name}: cannot be read: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(fields, dict):
        raise ThinkError(f"scenario {name}: holds no fields; needed are name, description, ...")
    return _validated({"name": path.stem, **fields}, f"scenario {name}")


def _validated(fields: dict[str, Any], who: str) -> Scenario:
    try:
        return Scenario.model_validate(fields)
    except ValidationError as error:
        raise ThinkError(f"{who}: {'; '.join(_explain(e) for e in error.errors())}") from None


def _explain(error: Any) -> str:
    if not error["loc"]:
        return str(error["msg"]).removeprefix("Value error, ")
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return f"unknown field {name}; known are {', '.join(Scenario.model_fields)}"
    if error["type"] == "missing":
        return f"{name} is missing ({Scenario.model_fields[name].description})"
    field = Scenario.model_fields[name]
    return f"{name} is {error['input']!r}: {error['msg']} ({field.description})"
