"""Scenarios: the ones that come along, and what is rejected."""

from pathlib import Path

import pytest
import yaml

from tests.conftest import REPOSITORY
from think_vllm.errors import ThinkError
from think_vllm.tools.bench import scenario as scenarios
from think_vllm.tools.bench.scenario import LoadPoint, Scenario, known_scenarios, load_scenario

SMALL = {"name": "x", "description": "d", "prompt_tokens": 100, "output_tokens": 10}
PREFIXES = {**SMALL, "dataset": "prefix_repetition", "prefix_tokens": 60}


def test_known_scenarios_are_those_of_the_configs() -> None:
    assert (REPOSITORY / "configs" / "load").resolve() == scenarios.FOLDER
    assert set(known_scenarios()) == {
        *("paper", "context-1k", "document-8k", "prompt-2k", "chat", "tenants", "mixed", "burst")
    }


@pytest.mark.parametrize("name", known_scenarios())
def test_load_scenario_reads_each(name: str) -> None:
    scenario = load_scenario(name)
    assert scenario.name == name
    assert scenario.points()
    if name != "document-8k":
        scenario.check_length(2048)  # of the bundled model


def test_load_scenario_reads_the_papers_lengths() -> None:
    paper = load_scenario("paper")
    assert (paper.prompt_tokens, paper.output_tokens) == (160, 338)
    assert not paper.prefix_caching


def test_every_field_says_what_it_means() -> None:
    assert all(field.description for field in Scenario.model_fields.values())


def test_points_send_some_requests_for_each_place() -> None:
    scenario = Scenario(**SMALL, concurrency=(2, 50, 300), num_prompts=100, prompts_per_place=3)
    points = {2: 6, 50: 100, 300: 300}
    assert scenario.points() == [LoadPoint(n, concurrency=places) for places, n in points.items()]
    assert scenario.most_in_flight == 300


def test_points_of_rates_have_all_requests_in_flight_at_worst() -> None:
    scenario = Scenario(**SMALL, request_rate=(0.5, 4), num_prompts=40)
    assert [point.request_rate for point in scenario.points()] == [0.5, 4]
    assert scenario.most_in_flight == 40


def test_longest_request_counts_the_spread() -> None:
    assert Scenario(**SMALL, concurrency=(1,)).longest_request == 110
    assert Scenario(**SMALL, concurrency=(1,), length_spread=0.55).longest_request == 155 + 16


def test_check_length_says_the_way_out() -> None:
    scenario = load_scenario("document-8k")
    scenario.check_length(8448)
    with pytest.raises(ThinkError, match=r"8448 tokens .* takes 8447 .*a scenario with shor"):
        scenario.check_length(8447)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**SMALL}, "give either concurrency or request_rate"),
        ({**SMALL, "concurrency": [1], "request_rate": [1]}, "give either concurrency or"),
        ({**SMALL, "concurrency": [0]}, "concurrency has a number below 1"),
        ({**SMALL, "request_rate": [0]}, "request_rate has a number that is not above 0"),
        ({**SMALL, "request_rate": [float("inf")]}, "or infinite"),
        ({**SMALL, "concurrency": ["many"]}, "concurrency is 'many'"),
        ({**SMALL, "concurrency": [1], "prompt_tokens": 0}, "prompt_tokens is 0: .*greater than"),
        ({**SMALL, "concurrency": [1], "output_tokens": 1}, "output_tokens is 1"),
        ({**SMALL, "concurrency": [1], "length_spread": 1}, "length_spread is 1: .*less than 1"),
        ({**SMALL, "concurrency": [1], "tokens": 5}, "unknown field tokens; known are name, desc"),
        ({"name": "x", "concurrency": [1]}, r"description is missing \(One sentence"),
        ({**SMALL, "concurrency": [1], "name": "A b"}, "name is 'A b'"),
        ({**SMALL, "concurrency": [1], "prefix_tokens": 5}, "needs dataset: prefix_repetition"),
        ({**PREFIXES, "concurrency": [1], "prefix_tokens": 100}, "below prompt_tokens"),
        ({**PREFIXES, "concurrency": [1], "length_spread": 0.1}, "needs dataset: random"),
        ({**PREFIXES, "concurrency": [2], "num_prefixes": 9}, "is 9, and a load has 8 requests"),
    ],
)
def test_load_scenario_rejects(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    with pytest.raises(ThinkError, match=message) as caught:
        load_scenario(str(path))
    assert str(caught.value).startswith(f"scenario {path}: ")


def test_load_scenario_reads_a_file_and_names_it_so(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    fields = {key: value for key, value in SMALL.items() if key != "name"}
    path.write_text(yaml.safe_dump({**fields, "concurrency": [1]}), encoding="utf-8")
    assert load_scenario(str(path)).name == "mine"


@pytest.mark.parametrize("text", ["- 1", "", "a: [", "\t"])
def test_load_scenario_rejects_other_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ThinkError, match=r"cannot be read|holds no fields"):
        load_scenario(str(path))


@pytest.mark.parametrize("name", ["nope", "nope.yaml"])
def test_load_scenario_lists_those_there_are(name: str) -> None:
    with pytest.raises(ThinkError, match=f"no scenario '{name}'; there are burst, chat, .*paper"):
        load_scenario(name)


def test_changed_is_checked_again() -> None:
    chat = load_scenario("chat")
    assert chat.changed(concurrency=(50,)).points() == [LoadPoint(200, concurrency=50)]
    with pytest.raises(ThinkError, match="scenario chat: num_prefixes is 32, and a load has 8"):
        chat.changed(concurrency=(2,))
