"""`--name=value` and `--config.a.b=value`: each is read as the type of its field and put among a command's values.

Names are new only where a config holds items by name: reward groups, their terms, a term's arguments, parts of a mix.
`=None` takes such an item out, and sets any other field to its default.
"""

import ast
import collections
import contextlib
import pathlib
import re
import typing
from collections.abc import Callable, Sequence
from typing import Any

from rsagent_jax.config.ranges import item_class, plain_type
from rsagent_jax.runtime.paths import open_path


class GivenText(str):
    """From the command line: not yet of its field's type."""


def is_given(value: Any) -> bool:
    """Whether all of it is from the command line."""
    return (
        bool(value) and all(map(is_given, value.values())) if isinstance(value, dict) else isinstance(value, GivenText)
    )


BOOLS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def split_arguments(argv: Sequence[str], is_switch: Callable[[str], bool]) -> tuple[list[tuple[str, str]], list[str]]:
    """(name, text) of every `--name=text`, `--name text`, `--switch` and `--noswitch`, and the arguments beside them.

    `is_switch` says of a flag's name whether it may stand without a text.
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
        if text is None and is_switch(name):
            text = "true"
        elif text is None and is_switch(switch := re.sub("^no-?", "", name)):
            name, text = switch, "false"
        elif text is None:
            text = todo.popleft() if todo and not todo[0].startswith("-") else ""
        pairs.append((name, text))
    return pairs, rest


def put_overrides(pairs: Sequence[tuple[str, str]], values: dict) -> list[str]:
    """Puts what `split_arguments` found into `values`, to be read with the rest; returns what has no place there."""
    problems = []
    for name, text in pairs:
        group, (*parents, last) = values, name.split(".")
        for parent in parents:
            if group.get(parent) is None:
                group[parent] = {}
            group = group[parent]
            if not isinstance(group, dict):
                wrong = "is reached by the names of its items, but the config file has a list"
                problems.append(f"--{name}={text}: {parent} {wrong}")
                break
        else:  # what is there is taken out; to take out what is not there is a slip
            group[last] = None if text == "None" and group.get(last) is not None else GivenText(text)
    return problems


def read_text(hint: Any, text: str) -> Any:
    """The text as the type; ValueError says what it must be."""
    kind = plain_type(hint)
    if kind is str:
        return str(text)
    if kind is pathlib.Path:
        return open_path(text)
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
            return str(text)
        if typing.get_origin(kind) is tuple and item_class(kind) is None:
            raise ValueError(f"a list, such as ({text.strip('()')!r},) or ()") from None
        raise ValueError("a group of fields: give one of them, as in --config.group.field=value") from None
