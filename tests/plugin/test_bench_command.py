"""``think-vllm bench``: what it rejects before anything is started."""

import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from think_vllm.tools.bench.configuration import DEFAULT_FLAGS, read_engine
from think_vllm.tools.cli import main

MEMORY = ("--kv-cache-memory-bytes", "50MB")


@pytest.fixture(autouse=True)
def vllm_level() -> Iterator[None]:
    """The command silences vLLM's loggers for its process, which here has other tests to run."""
    logger = logging.getLogger("vllm")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--kv-cache-memory-bytes SIZE is needed"),
        ([*MEMORY, "--scenario", "nope"], "there are burst, chat, "),
        ([*MEMORY, "--scenario", "paper", "paper"], "has one name twice: paper, paper"),
        ([*MEMORY, "--scenario", "chat", "--concurrency", "1"], "num_prefixes is 32"),
        ([*MEMORY, "--request-rate", "-1"], "request_rate has a number that is not above 0"),
        ([*MEMORY, "--scenario", "document-8k"], "takes 2048 (max_model_len); choose a scenario"),
        ([*MEMORY, "--server-args", "--max-model-len 400"], "takes 400 (max_model_len)"),
        ([*MEMORY, "--config", "--kv-channel-prune 2"], "--kv-channel-prune is 2.0"),
        ([*MEMORY, "--config", "--kv-quant int3"], 'bench: --config "--kv-quant int3"'),
        ([*MEMORY, "--config", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        ([*MEMORY, "--config", "--kv-channel-prune 0.001"], "prunes no channel of this model"),
        ([*MEMORY, "--config", "kv-quant"], "holds no flags; write them in quotes"),
        ([*MEMORY, "--compare", "no-such-file"], "--compare no-such-file: cannot be read"),
        (["--base-url", "http://x", *MEMORY], "--kv-cache-memory-bytes is for servers that are st"),
        (["--base-url", "localhost:1"], "'localhost:1' is no address; write it as in http"),
        (["--base-url", "http://x", "--no-plain"], "--no-plain is for servers that are started"),
    ],
)
def test_bench_rejects_in_one_line(recall_model, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    status = main(["bench", str(recall_model), "--out", str(out), "--no-plots", *arguments])
    said = capsys.readouterr().err
    assert status == 2
    assert message in said
    assert said.startswith("think-vllm: error: ")
    assert said.count("\n") == 1
    assert not out.exists()


def test_bench_rejects_a_server_that_is_not_there(recall_model, tmp_path, capsys):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        arguments = ["bench", str(recall_model), "--base-url", url, "--out", str(tmp_path / "out")]
        assert main(arguments) == 2
    assert f"--base-url {url}: no OpenAI-compatible server answers there" in capsys.readouterr().err


def test_bench_rejects_a_folder_with_results(recall_model, tmp_path, capsys):
    (tmp_path / "results.json").write_text("{}", encoding="utf-8")
    assert main(["bench", str(recall_model), *MEMORY, "--out", str(tmp_path)]) == 2
    assert "holds the results of another run; name another directory" in capsys.readouterr().err


@pytest.mark.parametrize("flags", DEFAULT_FLAGS)
def test_read_engine_plans_what_is_recommended(recall_model: Path, flags: str) -> None:
    engine = read_engine(str(recall_model), flags.split(), "test")
    assert engine.max_model_len == 2048
    assert engine.thin is not None
    assert engine.thin.plan is not None
    assert not engine.windowed
    # Fewer blocks than dense ones of as many tokens.
    assert engine.blocks_for(2000, 128) < -(-2000 // engine.thin.plan.block_size)


def test_read_engine_of_plain_vllm(recall_model: Path) -> None:
    engine = read_engine(str(recall_model), ["--max-model-len", "500"], "test")
    assert (engine.max_model_len, engine.thin) == (500, None)
    assert engine.blocks_for(300, 128) == 3
