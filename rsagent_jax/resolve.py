"""`module:function` paths in configs: the one place that turns the string into the callable."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from rsagent_jax.types import DataError


def resolve(path: str) -> Callable[..., Any]:
    """The callable that `path` names, such as `rsagent_jax.rewards:final_iou`.

    A module beside `train.py`, or anywhere else on `sys.path`, is found like an installed one.

    Raises:
      DataError: the path is not `module:function`, the module or the function does not exist (the message names the
        closest match), or what is named cannot be called. An error inside the user's own module is not caught: its
        traceback is what mends it.
    """
    module_name, colon, function_name = path.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module_name.split("."), function_name)):
        raise DataError(f"{path!r} is not of the form module:function, such as rsagent_jax.rewards:final_iou")
    module = _import(module_name, path)
    try:
        function = getattr(module, function_name)
    except AttributeError:
        public = [name for name in dir(module) if not name.startswith("_") and callable(getattr(module, name))]
        raise DataError(
            f"{path!r}: module {module_name} has no {function_name!r}{_closest(function_name, public)}"
        ) from None
    if not callable(function):
        raise DataError(f"{path!r} is a {type(function).__name__}, not a function")
    return function


def _import(name: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name != missing and not name.startswith(missing + "."):
            raise  # the module exists and one of its own imports does not
    parent, _, leaf = missing.rpartition(".")
    places = getattr(importlib.import_module(parent), "__path__", ()) if parent else None
    siblings = [] if places == () else [info.name for info in pkgutil.iter_modules(places)]
    hint = _closest(leaf, siblings, prefix=f"{parent}." if parent else "")
    raise DataError(f"{path!r}: no module named {missing!r}{hint}")


def _closest(word: str, candidates: Iterable[str], prefix: str = "") -> str:
    match = difflib.get_close_matches(word, list(candidates), n=1)
    return f"; did you mean {prefix + match[0]!r}?" if match else ""
