"""The command line that a server prints to be tried with."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import serve_arguments
from think_vllm.tools.example import example_hint

PROMPT = """what's "it"?"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "example.json").write_text(json.dumps({"prompt": PROMPT, "answer": "x"}))
    return tmp_path


def command(arguments: Any, environment: dict[str, str] | None = None) -> list[str]:
    """Words of the line, without the body."""
    hint = example_hint(arguments, environment or {})
    assert hint is not None
    (line,) = (line for line in hint.splitlines() if "curl" in line)
    *words, body = shlex.split(line)
    assert json.loads(body)["prompt"] == PROMPT
    return [*words, json.loads(body)["model"]]


SSL = {"ssl_keyfile": "k", "ssl_certfile": "c"}


@pytest.mark.parametrize(
    ("given", "options", "server"),
    [
        ({}, [], "http://localhost:8000"),
        ({"port": 8123}, [], "http://localhost:8123"),
        ({"host": "127.0.0.1"}, [], "http://127.0.0.1:8000"),
        ({"host": "::1"}, [], "http://[::1]:8000"),
        ({"host": "0.0.0.0"}, [], "http://127.0.0.1:8000"),
        ({"host": "::"}, [], "http://[::1]:8000"),
        ({"host": "gpu-1"}, [], "http://gpu-1:8000"),
        ({"uds": "/a b.sock", "host": "::1"}, ["--unix-socket", "/a b.sock"], "http://localhost"),
        (SSL, ["-k"], "https://localhost:8000"),
        ({**SSL, "uds": "/tmp/s"}, ["-k", "--unix-socket", "/tmp/s"], "https://localhost"),
        ({"ssl_certfile": "c"}, ["-k"], "https://localhost:8000"),
        ({**SSL, "ssl_cert_reqs": 1}, ["-k"], "https://localhost:8000"),
        ({"root_path": "/behind/a/proxy"}, [], "http://localhost:8000"),
    ],
    ids=str,
)
def test_line_reaches_the_server(model, given, options, server):
    found = command(serve_arguments(str(model), **given))
    json_type = ["-H", "Content-Type: application/json"]
    url = f"{server}/v1/completions"
    assert found == ["curl", "-s", *options, url, *json_type, "-d", str(model)]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"served_model_name": ["a", "b"]}, "a"),
        ({"served_model_name": "a"}, "a"),
        ({"served_model_name": []}, None),
    ],
    ids=str,
)
def test_line_names_the_model_as_it_is_served(model, given, name):
    assert command(serve_arguments(str(model), **given))[-1] == (name or str(model))


def test_model_may_come_from_a_file(model):
    assert command(serve_arguments(None, model=str(model)))[-1] == str(model)
    # What a person writes goes before.
    assert command(serve_arguments(str(model), model="other"))[-1] == str(model)


@pytest.mark.parametrize("environment", [{}, {"VLLM_API_KEY": "secret"}])
@pytest.mark.parametrize("given", [{}, {"api_key": ["secret"]}])
def test_line_has_the_key_by_its_variable(model, given, environment):
    hint = example_hint(serve_arguments(str(model), **given), environment)
    assert hint is not None
    assert "secret" not in hint
    needed = bool(given or environment)
    assert ('-H "Authorization: Bearer $VLLM_API_KEY" -d ' in hint) is needed


@pytest.mark.parametrize("given", [{"headless": True}, {"grpc": True}, {"ssl_cert_reqs": 2}])
def test_servers_that_the_line_would_not_reach_have_none(model, given):
    assert example_hint(serve_arguments(str(model), **given), {}) is None


def test_models_without_an_example_have_no_line(tmp_path):
    assert example_hint(serve_arguments(str(tmp_path)), {}) is None
    assert example_hint(serve_arguments("org/model"), {}) is None
