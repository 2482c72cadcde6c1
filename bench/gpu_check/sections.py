"""What is checked and measured, in which order, and how long each may take."""

import importlib.util
import sys

from bench.gpu_check.runner import Section

#: Seconds for all sections of a part. Unpacking the kit comes on top of the first one.
BUDGETS = {1: 465.0, 2: 420.0}
#: Tests that need no vLLM.
KERNEL_TESTS = (
    "units", "store", "scores", "compact", "decode", "context", "static_attention", "static_store",
)  # fmt: skip
#: Processes of pytest-xdist: more would compile faster than one GPU runs.
TEST_PROCESSES = 12
PYTHON = sys.executable


def sections_of(part: int) -> list[Section]:
    """Sections of a part, the most telling ones first.

    Args:
        part: 1: kernels, without a server; 2: served.
    """
    return _kernels() if part == 1 else _served()


def _kernels() -> list[Section]:
    tests = [f"tests/triton/test_{name}.py" for name in KERNEL_TESTS]
    parallel = ("-n", str(TEST_PROCESSES)) if importlib.util.find_spec("xdist") else ()
    # A process that cannot see the GPU would interpret kernels and pass.
    pytest = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *parallel, *tests)
    one = (PYTHON, "-m", "bench.gpu_check.kernel")
    return [
        Section("tests", 140, pytest, environment=(("TRITON_INTERPRET", "0"),)),
        Section("vllm", 40, (PYTHON, "-m", "bench.gpu_check.loads", "--out", "{out}/vllm.json")),
        Section("compaction", 25, (*one, "compaction")),
        Section(
            "compilations", 45,
            (PYTHON, "-m", "bench.gpu_check.compilations", "--out", "{out}/compilations.json"),
        ),
        Section(
            "attention", 130,
            (PYTHON, "-m", "bench.gpu_attention", "--rounds", "11", "--without", "torch",
             "--out", "{out}/attention.json"),
        ),
        Section(
            "counters", 50,
            (PYTHON, "-m", "bench.gpu_check.counters", "--out", "{out}/counters.json"),
            needs="ncu",
        ),
        Section(
            "sanitizer", 35,
            ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *one,
             "compaction", "--times", "2"),
            needs="compute-sanitizer",
        ),
    ]  # fmt: skip


def _served() -> list[Section]:
    load = (PYTHON, "-m", "bench.gpu_check.load")
    answers = (PYTHON, "-m", "bench.gpu_check.answers", "--out", "{out}/answers.json")
    configurations = {
        "plain": (),
        "k4v2": ("--ratio", "0.5", "--quant", "k4v2"),
        "kivi4": ("--ratio", "0.4", "--quant", "kivi4"),
        "plain-fp8": ("--kv-cache-dtype", "fp8"),
    }
    return [
        Section("answers", 100, answers),
        *(
            Section(f"load-{name}", 80, (*load, *arguments, "--out", f"{{out}}/load-{name}.json"))
            for name, arguments in configurations.items()
        ),
    ]
