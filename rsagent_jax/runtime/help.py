"""--help: what a command does, its flags, its configs and every field of them, read from the sources.

Sources are parsed, not imported, so that the answer needs neither jax nor the weights of anything. The words beside a
flag or a field are the comment that stands beside it, or above it, where it is declared.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import io
import textwrap
import tokenize
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from rsagent_jax.config.build import item_name
from rsagent_jax.config.ranges import Arguments, hints, item_class

WIDTH, COLUMN = 120, 44

Row = tuple[str, str]  # a name with its default, and what it is


def help_page(source: str, configs: Iterable[tuple[str, type | None, str]]) -> str:
    """The page of a command's source. configs: (path, its class, what it is) of all there are."""
    tree, comments = ast.parse(source), read_comments(source)
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    arguments, positional = main.args, list(_arguments(main.args))
    flags = [_flag(arg, default, comments) for arg, default in positional if arg not in arguments.posonlyargs]
    places = [(arg.arg.upper(), _beside(comments, arg)) for arg in arguments.posonlyargs]
    if arguments.vararg:
        places.append((f"{arguments.vararg.arg.upper()} …", _beside(comments, arguments.vararg)))
    parts = [ast.get_docstring(tree) or "", *_section("Arguments", places), *_section("Flags", flags)]
    classes = [cls for arg, _ in positional if arg.arg == "config" for cls in _classes(tree, arg.annotation)]
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
                text = f"{text} ({' | '.join(words)})".strip()
            shown = "" if value is dataclasses.MISSING else value if isinstance(value, str) else repr(value)
            yield name, f"={shown}", text


@functools.cache
def _field_comments(cls: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(cls))
    comments, (node,) = read_comments(source), ast.parse(source).body
    return {n.target.id: _beside(comments, n) for n in node.body if isinstance(n, ast.AnnAssign)}


def read_comments(source: str) -> dict[int, tuple[bool, str]]:
    """Line -> (whether it stands there alone, the comment)."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = (token for token in tokens if token.type == tokenize.COMMENT)
    return {t.start[0]: (not t.line[: t.start[1]].strip(), t.string.lstrip("# ")) for t in found}


def _beside(comments: dict[int, tuple[bool, str]], node: ast.AST, last: int = 0) -> str:
    """The comment lines right above a node, and the comment on its (or the `last`) line."""
    first, words = node.lineno - 1, []
    while first in comments and comments[first][0]:
        words.insert(0, comments[first][1])
        first -= 1
    last = last or node.end_lineno
    return " ".join(words + ([comments[last][1]] if last in comments else []))


def _arguments(arguments: ast.arguments) -> Iterator[tuple[ast.arg, ast.expr | None]]:
    """Parameters with their defaults, those that are given by position first."""
    before = [*arguments.posonlyargs, *arguments.args]
    yield from zip(before, [None] * (len(before) - len(arguments.defaults)) + arguments.defaults, strict=True)
    yield from zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)


def _flag(arg: ast.arg, default: ast.expr | None, comments: dict[int, tuple[bool, str]]) -> Row:
    name, value = f"--{arg.arg}", ast.literal_eval(default) if default is not None else None
    text = _beside(comments, arg, default.end_lineno if default is not None else 0)
    if arg.arg == "config":
        text = text or "a file of configs/; --config.a.b=value sets one of its fields"
    shown = {True: name, False: name, None: f"{name}=", "": f"{name}="}.get(value, f"{name}={value}")
    return shown, text + (" (required)" if default is None else "")


def _classes(tree: ast.Module, annotation: ast.expr) -> list[type]:
    """The classes that an annotation names, from where the source imports them."""
    names = [node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)]
    homes = {a.name: node.module for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
    return [getattr(importlib.import_module(homes[name]), name) for name in names]


def _section(title: str, rows: list[Row]) -> list[str]:
    if not rows:
        return []
    lines = ["", f"{title}:"]
    for name, text in rows:
        head = f"  {name}".ljust(COLUMN)
        wrapped = textwrap.wrap(text, WIDTH - COLUMN) or [""]
        first = [f"{head}{wrapped[0]}".rstrip()] if len(head) == COLUMN else [head, f"{' ' * COLUMN}{wrapped[0]}"]
        lines += [*first, *(" " * COLUMN + more for more in wrapped[1:])]
    return lines
