"""RSAgent in JAX: a Qwen2.5-VL policy that segments what a sentence describes, with tools. Never imports torch."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors: at run time each is imported when it is first asked for
    from rsagent_jax.api import Agent, Result, TurnStream
    from rsagent_jax.types import DataError

__version__ = "0.1.0"
__all__ = ["Agent", "DataError", "Result", "TurnStream"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{'types' if name == 'DataError' else 'api'}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
