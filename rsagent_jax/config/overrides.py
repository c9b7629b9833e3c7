"""`--config.a.b=value` on the command line: each is read as the type of its field and put into a config file's values.

Names are new only where a config holds items by name: reward groups, their terms, a term's arguments, parts of a mix.
`=None` takes such an item out, and sets any other field to its default.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import dataclasses
import difflib
import re
import typing
from typing import Any

from rsagent_jax.config.build import hints, item_class, plain_type
from rsagent_jax.config.ranges import Arguments

BOOLS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def apply_overrides(argv: list[str], cls: type, values: dict) -> tuple[list[str], list[str]]:
    """Puts the overrides among `argv` into `values`; returns the arguments that are none, and what is wrong."""
    rest, problems, todo = [], [], collections.deque(argv)
    while todo:
        arg = todo.popleft()
        match = re.fullmatch(r"--?(no)?config\.([^=]+)(?:=(.*))?", arg, re.DOTALL)
        if arg == "--" or not match:
            rest += [arg, *todo] if arg == "--" else [arg]
            if arg == "--":
                break
            continue
        negated, name, text = match.groups()
        hint = _hint(cls, name.split("."))
        if text is None and hint is bool:
            text = str(not negated)
        elif text is None:  # --config.a.b value
            text = todo.popleft() if todo and not todo[0].startswith("-") else ""
        if hint is None or (text == "None" and _is_item(cls, name) and not _holds(values, name)):
            problems.append(
                f"unknown field --config.{name}{did_you_mean(name, _known(cls, values, name), '--config.')}"
            )
            continue
        try:
            _put(values, name, None if text == "None" else _read(hint, text))
        except ValueError as error:
            problems.append(f"--config.{name}={text}: {name} must be {error}, got {text!r}")
    return rest, problems


def did_you_mean(name: str, known: list[str], prefix: str = "") -> str:
    """The closest name; failing that the one whose last part is closest (`--config.lr` for `sft.optim.lr`)."""
    tails = {leaf.rpartition(".")[2]: leaf for leaf in reversed(known)}
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    close = close or [tails[t] for t in difflib.get_close_matches(name.rpartition(".")[2], list(tails), n=1)]
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    parent = name.rpartition(".")[0]
    beside = [leaf.rpartition(".")[2] for leaf in known if parent and leaf.rpartition(".")[0] == parent]
    return f"; known fields: {', '.join(dict.fromkeys(beside))}" if beside else ""


def _hint(cls: type, parts: list[str]) -> Any:
    """The type of the field, item or argument that the parts name; None where there is none."""
    hint: Any = cls
    for part in parts:
        if item := item_class(hint):
            hint = item
        elif hint == Arguments:
            hint = Any
        else:
            hint = hints(hint).get(part) if dataclasses.is_dataclass(hint) else None
    return hint


def _is_item(cls: type, name: str) -> bool:
    parent = _hint(cls, name.split(".")[:-1])
    return parent == Arguments or item_class(parent) is not None


def _holds(values: Any, name: str) -> bool:
    for part in name.split("."):
        if not isinstance(values, dict) or values.get(part) is None:
            return False
        values = values[part]
    return True


def _known(cls: type, values: dict, name: str) -> list[str]:
    """Dotted names of all fields and groups there are, those of a new item beside `name` among them."""
    parent = _hint(cls, name.split(".")[:-1])
    beside = [f.name for f in dataclasses.fields(parent)] if dataclasses.is_dataclass(parent) else []
    return _fields(values) + [f"{name.rpartition('.')[0]}.{field}" for field in beside if "." in name]


def _fields(values: dict, prefix: str = "") -> list[str]:
    out = []
    for key, value in values.items():
        out += [f"{prefix}{key}"] + (_fields(value, f"{prefix}{key}.") if isinstance(value, dict) else [])
    return out


def _put(values: dict, name: str, value: Any) -> None:
    *groups, last = name.split(".")
    for group in groups:
        if values.get(group) is None:
            values[group] = {}
        values = values[group]
        if not isinstance(values, dict):
            raise ValueError(f"reached by the names of its items, but the config file has a list of {group}")
    values[last] = value


def _read(hint: Any, text: str) -> Any:
    """The text as the type; ValueError says what it must be."""
    kind = plain_type(hint)
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in BOOLS:
            raise ValueError("true or false")
        return BOOLS[text.lower()]
    if kind is Any:
        return _guess(text)
    if kind in (int, float):
        return _number(kind, text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        if typing.get_origin(kind) is tuple and item_class(kind) is None:
            raise ValueError(f"a list, such as ({text.strip('()')!r},) or ()") from None
        raise ValueError("a group of fields: give one of them, as in --config.group.field=value") from None


def _number(kind: type, text: str) -> int | float:
    with contextlib.suppress(ValueError):
        return kind(text)
    with contextlib.suppress(ValueError):
        if float(text).is_integer():  # 1e3 steps
            return int(float(text))
    raise ValueError("a whole number" if kind is int else "a number")


def _guess(text: str) -> Any:
    """A number, bool, list or text: what an argument of a user's own function is, nobody has said."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    if text.lower() in ("true", "false"):
        return BOOLS[text.lower()]
    with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return ast.literal_eval(text)
    return text
