"""Files of one JSON object a line, as a kill, a full disk or an editor may leave them: half a line, NUL, other text."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

from rsagent_jax.runtime.paths import open_lines, read_bytes, read_lines, write_lines, write_whole

SUFFIX = ".damaged"  # of the file beside it, for lines that were left out


def parse_object(line: bytes) -> dict[str, Any]:
    """ValueError where it is anything but a JSON object in UTF-8."""
    value = json.loads(line.decode())
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def mend_lines(path: pathlib.Path, keep: Callable[[dict[str, Any]], bool]) -> list[str]:
    """Drops the lines that `keep` does not want, a last one that was half written, and those that are damaged, or that
    `keep` cannot read; the latter stay in <name>.damaged. What was dropped for a fault, in words, with file and line.

    The file changes as a whole or not at all; one that is not there is left so. DataError where it cannot be written.
    """
    if not path.exists():
        return []
    with open_lines(path) as file:  # line by line: a journal may be larger than the memory, and nothing is wrong mostly
        if all(_stays(line, keep) for line in file):
            return []
    *lines, rest = read_lines(path).split(b"\n")
    kept, damaged, notes = [], [], []
    try:
        parse_object(rest)
        lines.append(rest)  # whole but for its newline
    except ValueError:
        if rest:
            notes.append(
                f"{path}: the last line was half written, by a run that was killed, and is cut off ({len(rest)} bytes)"
            )
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip() and keep(parse_object(line)):
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError) as error:
            damaged.append((f"{path}, line {number}", line, error))
    if damaged:
        aside = path.with_name(path.name + SUFFIX)
        before = read_bytes(aside) if aside.exists() else b""
        write_whole(aside, before + b"".join(line + b"\n" for _, line, _ in damaged))
        (where, _, error), count = damaged[0], len(damaged)
        more = f", and {count - 1} more lines" * (count > 1)
        notes.append(f"{where}: damaged ({error!r}){more}: left out, and kept in {aside}")
    write_lines(path, b"".join(kept))
    return notes


def _stays(line: bytes, keep: Callable[[dict[str, Any]], bool]) -> bool:
    try:
        return line.endswith(b"\n") and keep(parse_object(line))
    except (ValueError, KeyError, TypeError):
        return False


def keep_lines(path: pathlib.Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """The same, said on the terminal."""
    for note in mend_lines(path, keep):
        print(note)
