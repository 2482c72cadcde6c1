"""One touch of vLLM that is not a documented extension point, and whether this vLLM allows it."""

import importlib
import inspect
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Kind(Enum):
    """What is done with a name of vLLM."""

    WRAPPED = "wrapped"
    CALLED = "called"
    READ = "read"
    SET = "set"
    SUBCLASSED = "subclassed"


class Role(Enum):
    """Which processes install a wrapper, and when."""

    PLUGIN = "every process that loads the plugin, on any vLLM"
    BACKEND = "every process that loads the plugin, on a vLLM that it extends"
    PARSER = "programs that parse vLLM's engine arguments"
    FRONT_END = "processes with a config that uses our flags"
    REPORTS = "those of them whose engine has blocks that become thin"
    SCHEDULER = "processes with a KV cache spec of ours"
    WORKER_V1 = "workers with thin blocks and model runner V1"
    WORKER_V2 = "workers with thin blocks and model runner V2"


@dataclass(frozen=True)
class Patch:
    """A private name of vLLM, or one that is replaced or set from outside."""

    target: str  # ``module:Class.attribute``; ``"new | old"`` where releases differ
    kind: Kind  # what is done with it
    #: Our wrapper as ``module:function``, else our module or package; both below ``think_vllm``.
    where: str
    why: str  # what it is needed for
    until: str | None  # the change of vLLM that ends it; None if it is meant to stay
    role: Role | None = None  # which processes install it; None for what is not wrapped
    device: str | None = None  # ``"cpu"`` or ``"cuda"`` if only that one needs it
    #: All parameters of a function, in order; None for anything else.
    parameters: tuple[str, ...] | None = None
    members: tuple[str, ...] = ()  # other attributes of the class that are used with it
    #: Whether the wrapper runs only for objects whose ``vllm_config`` asks for thin blocks.
    engines_only: bool = False

    @property
    def name(self) -> str:
        """Name of the target without its module."""
        return self.target.rpartition(":")[2]

    def problem(self) -> str | None:
        """What the installed vLLM has not, or has otherwise; None if all is as expected."""
        try:
            owner, name = locate(self.target)
            value = getattr(owner, name, None)
        except LookupError as error:
            return str(error)
        kind = value if isinstance(value, type) else owner
        if missing := [member for member in self.members if not _has(kind, member)]:
            return f"{kind.__name__} has no {', '.join(missing)}"
        if self.parameters is not None and value is not None:
            found = tuple(inspect.signature(value).parameters)
            if found != self.parameters:
                return f"takes ({', '.join(found)}), not ({', '.join(self.parameters)})"
        return None


def locate(target: str) -> tuple[Any, str]:
    """Find what has the last name of a target, and that name.

    Raises:
        LookupError: If it is in none of its places.
    """
    for place in target.split(" | "):
        module, _, path = place.partition(":")
        *outer, name = path.split(".")
        try:
            owner: Any = importlib.import_module(module)
            for each in outer:
                owner = getattr(owner, each)
        except (ImportError, AttributeError):
            continue
        if _has(owner, name):
            return owner, name
    raise LookupError(f"there is no {target}")


def _has(owner: Any, name: str) -> bool:
    """Whether an object has an attribute; of a class, its fields and what it sets when made."""
    if hasattr(owner, name) or name in getattr(owner, "__dataclass_fields__", {}):
        return True
    constructors = [vars(kind).get("__init__") for kind in getattr(owner, "__mro__", ())]
    codes = [getattr(inspect.unwrap(each), "__code__", None) for each in constructors if each]
    return any(name in code.co_names for code in codes if code is not None)
