"""--help: what a command does, its flags, its configs and every field of them, read from the sources.

Sources are parsed, not imported, so that the answer needs neither jax nor the weights of anything. The words beside a
flag or a field are the comment that stands beside it, or above it, where it is declared.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import itertools
import re
import textwrap
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from rsagent_jax.config.build import item_name
from rsagent_jax.config.ranges import Arguments, hints, item_class

WIDTH, COLUMN = 120, 44

Row = tuple[str, str]  # a name with its default, and what it is


def help_page(source: str, configs: Iterable[tuple[str, type | None, str]]) -> str:
    """The page of a command's source. configs: (path, its class, what it is) of all there are."""
    tree, lines = ast.parse(source), source.splitlines()
    (main,) = (node.args for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    places = [*main.posonlyargs, *filter(None, [main.vararg])]
    flags = [
        *zip(main.args, [*[None] * (len(main.args) - len(main.defaults)), *main.defaults], strict=True),
        *zip(main.kwonlyargs, main.kw_defaults, strict=True),
    ]
    parts = [ast.get_docstring(tree) or ""]
    parts += _section("Arguments", [(a.arg.upper(), _beside(lines, a.lineno, a.end_lineno)) for a in places])
    parts += _section("Flags", [_flag(arg, default, lines) for arg, default in flags])
    classes = [cls for arg, _ in flags if arg.arg == "config" for cls in _classes(tree, arg.annotation)]
    parts += _section("Configs", [(path, text) for path, cls, text in configs if cls in classes])
    for cls in classes:
        rows = [(f"--config.{name}{value}", text) for name, value, text in field_rows(cls)]
        parts += _section(f"Fields of {cls.__name__}" if len(classes) > 1 else "Fields of the config", rows)
    return "\n".join(parts)


def field_rows(cls: type, default: Any = None, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted name, "=default" or "", what it is) of every field of a config's class and of the groups inside it."""
    comments = _field_comments(cls)
    for field in dataclasses.fields(cls):
        hint, name = hints(cls)[field.name], prefix + field.name
        value = field.default if default is None else getattr(default, field.name)
        if dataclasses.is_dataclass(hint):
            yield from field_rows(hint, None if value is dataclasses.MISSING else value, f"{name}.")
        elif (item := item_class(hint)) or hint == Arguments:
            names = ", ".join(map(item_name, value or ()))
            text = inspect.cleandoc(item.__doc__).splitlines()[0] if item else ""
            yield f"{name}.NAME", "", f"{comments[field.name] or text}; there are: {names or 'none'}"
        else:
            words = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
            text = comments[field.name]
            if not all(word in text for word in words):
                text = f"{text} ({' | '.join(word or chr(34) * 2 for word in words)})"
            shown = "" if value is dataclasses.MISSING else value if isinstance(value, str) else repr(value)
            yield name, f"={shown}", text


@functools.cache
def _field_comments(cls: type) -> dict[str, str]:
    inherited = _field_comments(cls.__base__) if dataclasses.is_dataclass(cls.__base__) else {}
    lines = inspect.getsource(cls).splitlines()
    (node,) = ast.parse("\n".join(lines)).body
    return inherited | {
        n.target.id: _beside(lines, n.lineno, n.end_lineno) for n in node.body if isinstance(n, ast.AnnAssign)
    }


def _beside(lines: list[str], first: int, last: int) -> str:
    """The comment lines right above line `first`, and the comment at the end of line `last`, counted from 1."""
    above = itertools.takewhile(lambda line: line.lstrip().startswith("# "), reversed(lines[: first - 1]))
    return " ".join([*reversed([line.strip(" #") for line in above]), *re.findall(r"  # (.+)$", lines[last - 1])])


def _flag(arg: ast.arg, default: ast.expr | None, lines: list[str]) -> Row:
    text = _beside(lines, arg.lineno, (default or arg).end_lineno)
    if arg.arg == "config":
        text = "a file of configs/; --config.a.b=value sets one of its fields"
    if default is None:
        return f"--{arg.arg}=", f"{text} (required)"
    value = ast.literal_eval(default)
    return f"--{arg.arg}" + ("" if isinstance(value, bool) else f"={'' if value is None else value}"), text


def _classes(tree: ast.Module, annotation: ast.expr) -> list[type]:
    """The classes that an annotation names, from where the source imports them."""
    names = [node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)]
    homes = {a.name: node.module for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
    return [getattr(importlib.import_module(homes[name]), name) for name in names]


def _section(title: str, rows: list[Row]) -> list[str]:
    lines = ["", f"{title}:"] if rows else []
    for name, text in rows:
        head = f"  {name}".ljust(COLUMN - 1) + " "
        lines.append(textwrap.fill(text or "-", WIDTH, initial_indent=head, subsequent_indent=" " * COLUMN))
    return lines
