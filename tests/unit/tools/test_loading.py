"""A plugin that vLLM is told not to load says so, instead of vanishing."""

import pytest

from think_vllm.errors import ThinkError
from think_vllm.tools.loading import VARIABLE, check_loaded, left_out


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        ("lora_filesystem_resolver", "lora_filesystem_resolver,think_vllm"),
        ("a,b", "a,b,think_vllm"),
        ("", "think_vllm"),
        ("think_vllm_2", "think_vllm_2,think_vllm"),
        (" think_vllm", "think_vllm"),
        ("a, think_vllm", "a,think_vllm"),
    ],
)
def test_left_out_says_what_to_set(chosen, names):
    why = left_out({VARIABLE: chosen})
    assert f"{VARIABLE} is {chosen!r}, so vLLM does not load it" in why
    assert f"set {VARIABLE}={names}, or unset it" in why


@pytest.mark.parametrize("environment", [{}, {VARIABLE: "think_vllm"}, {VARIABLE: "a,think_vllm"}])
def test_left_out_is_silent_where_it_is_loaded(environment):
    assert left_out(environment) == ""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["m", "--kv-channel-prune", "0.5"], "--kv-channel-prune"),
        (["m", "--kv_channel_prune=0.5"], "--kv-channel-prune"),
        (["m", "--no-kv-prune-decode"], "--no-kv-prune-decode"),
        (["m", "--additional-config", '{"think": {}}'], "--additional-config with 'think'"),
        (["m", '--additional-config={"think": {}}'], "--additional-config with 'think'"),
        (["m", "--additional-config.think.kv_quant", "fp8"], "--additional-config.think.kv_quant"),
        (["m", "--additional-config", '{"kv_quant": "fp8"}'], "--additional-config with 'think'"),
        (["m", "--additional_config", '{"think_vllm": {}}'], "--additional-config with 'think'"),
        (["--config", "FILE"], "--kv-quant"),
        (["--config=FILE"], "--kv-quant"),
        (["--config", "FOLDER/json.yaml"], "--additional-config with 'think'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_our_options_are_rejected_where_it_is_not_loaded(arguments, named, tmp_path, monkeypatch):
    path = tmp_path / "serve_it.yaml"
    path.write_text("model: m\nkv_quant: fp8\n")
    (tmp_path / "json.yaml").write_text("additional-config: '{\"think\": {}}'\n")
    arguments = [word.replace("FILE", str(path)) for word in arguments]
    arguments = [word.replace("FOLDER", str(tmp_path)) for word in arguments]
    monkeypatch.setenv(VARIABLE, "other")
    with pytest.raises(ThinkError) as rejected:
        check_loaded(arguments)
    assert str(rejected.value).startswith(f"{named} is an option of think-vllm, and {VARIABLE} is")
    monkeypatch.setenv(VARIABLE, "other,think_vllm")
    check_loaded(arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        *(["m"], ["m", "--port", "1"]),
        *(["m", "--additional-config", value] for value in ('{"other": {}}', "x")),
    ],
)
def test_plain_servers_may_leave_it_out(arguments, monkeypatch):
    monkeypatch.setenv(VARIABLE, "other")
    check_loaded(arguments)
