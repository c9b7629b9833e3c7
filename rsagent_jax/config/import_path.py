"""`module:function` and `file.py:function` in configs: the one place that turns the string into the callable."""

import difflib
import functools
import importlib
import importlib.util
import inspect
import pathlib
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

from rsagent_jax.types import DataError


def import_path(path: str, call: Sequence[str] | None = None, keywords: dict | None = None) -> Callable[..., Any]:
    """The callable that `path` names, such as `rsagent_jax.rewards:final_iou` or `my_rewards.py:boundary_bonus`.

    A module is found on `sys.path`, where the folder of `train.py` is; a file by its path, which may be absolute or
    relative to the current directory, and what it imports may stand beside it.

    `call` names what it will be called with by position, `keywords` what by name; with None it is not looked at how it
    can be called.

    Raises:
      DataError: the path has another form, there is no such file, module or function (the message names the closest
        match), what is named cannot be called, or not in that way; or the user's own file raises while it is imported
        (the message names the line).
    """
    module_name, colon, function_name = path.rpartition(":")
    is_file = module_name.endswith(".py")
    parts = (function_name,) if is_file else (*module_name.split("."), function_name)
    if not colon or not all(part.isidentifier() for part in parts):
        raise DataError(
            f"{path!r} is not of the form module:function, such as rsagent_jax.rewards:final_iou, or file.py:function"
        )
    module = _import(module_name, path)
    try:
        function = getattr(module, function_name)
    except AttributeError:
        public = [name for name in dir(module) if not name.startswith("_") and callable(getattr(module, name))]
        hint = closest(function_name, public, "'{}'")
        raise DataError(f"{path!r}: {module_name} has no {function_name!r}{hint}") from None
    if not callable(function):
        raise DataError(f"{path!r} is a {type(function).__name__}, not a function")
    if call is not None:
        _check_call(path, function, call, keywords or {})
    return function


def shipped(path: str) -> str:
    """A path such as configs/segment.py as it is; where there is none from here, the one that came with the package."""
    here, ours = pathlib.Path(path), pathlib.Path(__file__).parents[2] / path
    return str(ours) if not here.exists() and ours.exists() else path


def closest(word: str, candidates: Iterable[str], form: str = "{}", cutoff: float = 0.6) -> str:
    """`; did you mean X?`, or nothing where no candidate is near; `form` is how X is written; `cutoff`: difflib's."""
    match = difflib.get_close_matches(word, list(candidates), 1, cutoff)
    return f"; did you mean {form.replace('{}', match[0])}?" if match else ""


def place(error: BaseException, file: str) -> str:
    """`FILE, line N`: where in the user's file an error arose; in another file only if that one does not parse."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    here = pathlib.Path(file).resolve()
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if pathlib.Path(f.filename).resolve() == here]
    return f"{file}, line {lines[-1]}" if lines else file


def first_line(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return text.strip().splitlines()[0] if text and text.strip() else "no message"


def _check_call(path: str, function: Callable[..., Any], call: Sequence[str], keywords: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # of a function of C, which does not tell
        return
    try:
        signature.bind(*call, **keywords)
    except TypeError as error:
        given = ", ".join([*call, *(f"{name}={value!r}" for name, value in keywords.items())])
        raise DataError(f"{path!r} takes {signature}, but is called with ({given}): {error}") from None


def _import(name: str, path: str) -> ModuleType:
    file = pathlib.Path(name).expanduser() if name.endswith(".py") else None
    if file and not file.is_file():
        siblings = sorted(str(f) for f in file.parent.glob("*.py"))
        hint = closest(str(file), siblings, "'{}'") or f" (looked for from {pathlib.Path.cwd()})"
        raise DataError(f"{path!r}: file {file} does not exist{hint}")
    try:
        return load_file(file.resolve()) if file else importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever the user's module raises is the user's to mend
        missing = getattr(error, "name", None) or ""
        there = name != missing and not name.startswith(f"{missing}.")  # but one of its own imports is not
        if file or there or not isinstance(error, ModuleNotFoundError):
            where = place(error, str(file.resolve()) if file else _origin(name))
            said = f"{where}: {type(error).__name__}: {first_line(error)}"
            raise DataError(f"{path!r} cannot be imported: {said}") from error
    parent, _, leaf = missing.rpartition(".")
    places = getattr(importlib.import_module(parent), "__path__", ()) if parent else None
    siblings = [] if places == () else [info.name for info in pkgutil.iter_modules(places)]
    hint = closest(leaf, siblings, f"'{parent}.{{}}'" if parent else "'{}'")
    raise DataError(f"{path!r}: no module named {missing!r}{hint}; a file is named by its path, as in my_file.py:f")


@functools.cache
def load_file(file: pathlib.Path) -> ModuleType:
    """Once per file. Its name is that of the file, so that a process that was given this one's sys.path finds it."""
    name = file.stem
    if getattr(sys.modules.get(name), "__file__", None) == str(file):
        return sys.modules[name]
    if name in sys.modules or not name.isidentifier():  # a module of another file has it
        name = f"{name}_{abs(hash(str(file.parent))):x}"
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _origin(name: str) -> str:
    try:
        return getattr(importlib.util.find_spec(name), "origin", None) or name
    except (ImportError, ValueError):  # of a package that does not load itself
        return name
