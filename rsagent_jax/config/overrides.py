"""`--name=value` and `--config.a.b=value`: each is read as the type of its field and put among a command's values.

Names are new only where a config holds items by name: reward groups, their terms, a term's arguments, parts of a mix.
`=None` takes such an item out, and sets any other field to its default.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import dataclasses
import difflib
import pathlib
import re
import typing
from collections.abc import Sequence
from typing import Any

from rsagent_jax.config.build import hints, item_class, plain_type
from rsagent_jax.config.ranges import Arguments

BOOLS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def split_arguments(argv: Sequence[str], cls: type) -> tuple[list[tuple[str, str]], list[str]]:
    """(name, text) of every `--name=text`, `--name text`, `--switch` and `--noswitch`, and the arguments beside them.

    `cls` is a dataclass with a field for every flag; those of its field `config` are flags as well.
    """
    pairs, rest, todo = [], [], collections.deque(argv)
    while todo:
        arg = todo.popleft()
        if arg == "--":
            return pairs, [*rest, *todo]
        if not (match := re.fullmatch(r"--?([A-Za-z_][^=]*)(?:=(.*))?", arg, re.DOTALL)):
            rest.append(arg)
            continue
        name, text = match.groups()
        if text is None and field_type(cls, name) is bool:
            text = "true"
        elif text is None and field_type(cls, switch := re.sub("^no-?", "", name)) is bool:
            name, text = switch, "false"
        elif text is None:
            text = todo.popleft() if todo and not todo[0].startswith("-") else ""
        pairs.append((name, text))
    return pairs, rest


def apply_overrides(pairs: Sequence[tuple[str, str]], cls: type, values: dict) -> list[str]:
    """Puts what `split_arguments` found into `values`; returns what is wrong."""
    problems = []
    for name, text in pairs:
        hint = field_type(cls, name)
        if hint is None or (text == "None" and _is_item(cls, name) and not _holds(values, name)):
            kind = "field" if name.startswith("config.") else "flag"
            problems.append(f"unknown {kind} --{name}{_did_you_mean(name, _known(cls, values, name))}")
            continue
        try:
            _put(values, name, None if text == "None" else _read(hint, text))
        except ValueError as error:
            problems.append(f"--{name}={text}: {name.removeprefix('config.')} must be {error}, got {text!r}")
    return problems


def field_type(cls: type, name: str) -> Any:
    """The type of the field, item or argument of this dotted name; None where there is none."""
    hint: Any = cls
    for part in name.split(".") if name else ():
        if item := item_class(hint):
            hint = item
        elif hint == Arguments:
            hint = Any
        else:
            hint = hints(hint).get(part) if dataclasses.is_dataclass(hint) else None
    return hint


def _did_you_mean(name: str, known: list[str]) -> str:
    """The closest name inside the deepest group that `name` gets right; failing that those whose last part is closest
    (`--config.lr` for `sft.optim.lr`)."""
    group, _, last = name.rpartition(".")
    while group and group not in known:
        group = group.rpartition(".")[0]
    start = f"{group}." if group else ""
    inside = dict.fromkeys(leaf.removeprefix(start) for leaf in known if leaf.startswith(start))
    tails = collections.defaultdict(list)
    for leaf in inside:
        tails[leaf.rpartition(".")[2]].append(leaf)
    close = difflib.get_close_matches(name.removeprefix(start), inside, n=1, cutoff=0.75)
    close = close or [leaf for tail in difflib.get_close_matches(last, tails, n=1) for leaf in tails[tail]]
    if close:
        return f"; did you mean {' or '.join(f'--{start}{leaf}' for leaf in close[:3])}?"
    return f"; known fields: {', '.join(leaf for leaf in inside if '.' not in leaf)}" if "." in group else ""


def _is_item(cls: type, name: str) -> bool:
    parent = field_type(cls, name.rpartition(".")[0])
    return parent == Arguments or item_class(parent) is not None


def _holds(values: Any, name: str) -> bool:
    for part in name.split("."):
        if not isinstance(values, dict) or values.get(part) is None:
            return False
        values = values[part]
    return True


def _known(cls: type, values: dict, name: str) -> list[str]:
    """Dotted names of all fields and groups there are, those of a new item beside `name` among them."""
    group = name.rpartition(".")[0]
    parent = field_type(cls, group)
    beside = [f.name for f in dataclasses.fields(parent)] if group and dataclasses.is_dataclass(parent) else []
    return _fields(values) + [f"{group}.{field}" for field in beside]


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
    if kind is pathlib.Path:
        return pathlib.Path(text).expanduser()
    if kind is bool:
        if text.lower() not in BOOLS:
            raise ValueError("true or false")
        return BOOLS[text.lower()]
    if kind in (int, float, Any):
        for number in (int, float):
            with contextlib.suppress(ValueError):
                if number is int or kind is not int or float(text).is_integer():  # 1e3 steps
                    return (int if kind is int else number)(number(text))
    if kind in (int, float):
        raise ValueError("a whole number" if kind is int else "a number")
    if kind is Any and text.lower() in ("true", "false"):
        return BOOLS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        if kind is Any:  # what an argument of a user's own function is, nobody has said
            return text
        if typing.get_origin(kind) is tuple and item_class(kind) is None:
            raise ValueError(f"a list, such as ({text.strip('()')!r},) or ()") from None
        raise ValueError("a group of fields: give one of them, as in --config.group.field=value") from None
