"""The command line that a server prints to be tried with."""

import json
import shlex
from pathlib import Path

from think_vllm.cli.serve import example_hint


def test_prompts_with_quotes_reach_the_server_as_they_are(tmp_path: Path) -> None:
    prompt = """what's "it"?"""
    (tmp_path / "example.json").write_text(json.dumps({"prompt": prompt, "answer": "x"}))
    hint = example_hint(str(tmp_path), None, 8000)
    assert hint is not None
    command = next(line for line in hint.splitlines() if "curl" in line)
    body = json.loads(shlex.split(command)[-1])
    assert body["prompt"] == prompt
    assert body["model"] == str(tmp_path)
