"""The command line that a server prints to be tried with."""

import argparse
import ipaddress
import json
import shlex
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: A model directory may carry one prompt with its right answer, to try a server with.
EXAMPLE_FILE = "example.json"


def example_hint(arguments: argparse.Namespace, environment: Mapping[str, str]) -> str | None:
    """A command line to try the server with, if the model comes with an example.

    Returns:
        Text for a person; None without an example, and for servers that curl cannot ask.
    """
    # A YAML file names the model by its option, a person by its place.
    model = arguments.model_tag or arguments.model
    path = Path(model or "") / EXAMPLE_FILE
    if not model or not path.is_file():
        return None
    if arguments.headless or arguments.grpc or arguments.ssl_cert_reqs == ssl.CERT_REQUIRED:
        return None
    example = json.loads(path.read_text(encoding="utf-8"))
    names = arguments.served_model_name
    name = (names if isinstance(names, str) else names[0]) if names else model
    asked = {"model": name, "prompt": example["prompt"], "max_tokens": 8, "temperature": 0}
    command = ["curl", "-s", *_reach(arguments), "-H", "Content-Type: application/json"]
    needs_key = arguments.api_key or environment.get("VLLM_API_KEY")
    # Not the key itself: this goes to logs.
    key = ' -H "Authorization: Bearer $VLLM_API_KEY"' if needs_key else ""
    line = f"{shlex.join(command)}{key} -d {shlex.quote(json.dumps(asked))}"
    return (
        "Once the server says 'Application startup complete.', in another terminal:\n\n"
        f"  {line}\n\n"
        f"The answer is {example['answer']!r}.\n"
    )


def _reach(arguments: argparse.Namespace) -> list[str]:
    """What curl needs to reach the server: options, then the address."""
    is_ssl = arguments.ssl_keyfile or arguments.ssl_certfile  # as uvicorn has it
    options = ["-k"] if is_ssl else []  # curl may not know who issued the certificate
    where = f"{_host(arguments.host)}:{arguments.port}"
    if arguments.uds:
        options += ["--unix-socket", str(arguments.uds)]
        where = "localhost"
    return [*options, f"{'https' if is_ssl else 'http'}://{where}/v1/completions"]


def _host(host: Any) -> str:
    """A host as it stands in an address; one of this machine for servers that listen on all."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host or "localhost"
    if address.is_unspecified:
        return "[::1]" if address.version == 6 else "127.0.0.1"
    return f"[{address}]" if address.version == 6 else str(address)
