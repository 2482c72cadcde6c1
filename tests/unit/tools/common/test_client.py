"""What errors of OpenAI's client say to a user."""

import pytest

from tests.support.fake_api import FakeApi
from think_vllm.errors import ThinkError
from think_vllm.tools.common.client import Client, RequestError, ServedModel
from think_vllm.tools.common.server import free_port


def client_of(url: str) -> Client:
    return Client(url, "test", timeout_s=30, retries=0)


def test_complete_sends_fields_that_replace_others() -> None:
    with FakeApi(lambda prompt: prompt.upper()) as api:
        client = client_of(f"{api.url}/v1/")
        assert client.complete("m", "a", 3, chat=False, extra={"top_k": 1}) == ("A", "stop")
        assert client.complete("m", "b", 3, chat=True, extra={"max_tokens": 5}) == ("B", "stop")
    both = {"model": "m", "temperature": 0}
    chat = {"messages": [{"role": "user", "content": "b"}], "max_tokens": 5}
    assert api.requests == [
        ("/v1/completions", both | {"prompt": "a", "max_tokens": 3, "top_k": 1}),
        ("/v1/chat/completions", both | chat),
    ]


def test_a_chat_answer_may_be_null_a_completion_may_not() -> None:
    with FakeApi(lambda _: None) as api:  # type: ignore[arg-type,return-value]
        assert client_of(api.url).complete("m", "a", 1, chat=True, extra={}) == ("", "stop")
        with pytest.raises(RequestError, match="not a response of OpenAI's API"):
            client_of(api.url).complete("m", "a", 1, chat=False, extra={})


def test_errors_say_what_the_server_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeApi(lambda _: 400) as api:
        client = client_of(api.url)
        with pytest.raises(RequestError, match=r'HTTP 400: \{"error": "rejected"\}'):
            client.complete("m", "a", 1, chat=False, extra={})
        with pytest.raises(RequestError, match=r"HTTP 404: \{\}"):
            client.get("/nothing")
        assert client.get_json("/version") == {"version": "1.2.3"}
        monkeypatch.setattr(client, "get", lambda _: "<html>")
        with pytest.raises(RequestError, match="no JSON came back"):
            client.get_json("/version")


def test_models_are_those_of_the_server() -> None:
    with FakeApi(lambda _: "", models=("a", "b"), max_model_len=9) as api:
        assert client_of(api.url).models() == [ServedModel("a", None, 9), ServedModel("b", None, 9)]
    with FakeApi(lambda _: "", key="secret") as api, pytest.raises(ThinkError) as error:
        client_of(api.url).models()
    assert 'HTTP 401: {"error": "no key"}' in str(error.value)
    assert "set OPENAI_API_KEY" in str(error.value)


def test_models_of_no_server() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ThinkError, match=f"test: --base-url {url}: no OpenAI-compatible.*refused"):
        client_of(url).models()
