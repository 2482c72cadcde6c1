"""vLLM's own ``vllm bench serve``, whose command does not start on the CPU build.

One load for each line of standard input, until there are no more: importing vLLM takes longer than
a short load. A line is a JSON object with its ``arguments``, and a file that is created when it is
``done``.
"""

import argparse
import json
import sys
from pathlib import Path

from vllm.benchmarks.serve import add_cli_args, main

if __name__ == "__main__":
    for line in sys.stdin:
        job = json.loads(line)
        # Built for each load: a default is the random part of the requests' names.
        parser = argparse.ArgumentParser()
        add_cli_args(parser)
        main(parser.parse_args(job["arguments"]))
        Path(job["done"]).touch()
