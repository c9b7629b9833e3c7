"""The page of rsagent_jax.view, and what it asks for: a page of rows, a trajectory, its tokens.

    Viewer(directories)                 one directory, or two of which the second is joined by the sample
    serve(viewer, port)                 on the loopback interface
    export_page(viewer, asked, limit)   the same page with so many trajectories in it, for a file

A request names a trajectory by its key, which is looked up among those that were read: nothing of it becomes a path.
"""

import contextlib
import dataclasses
import http.server
import json
import pathlib
import re
import threading
import urllib.parse
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from rsagent_jax.config.import_path import closest
from rsagent_jax.models.qwen25_vl.config import read_json
from rsagent_jax.report.page import render_page
from rsagent_jax.report.rows import WORDS, Row, RowIndex, select_rows
from rsagent_jax.runtime.journal import settings_of
from rsagent_jax.types import DataError

PAGE = 50  # rows of a page
SHOWN = 4  # trajectories of the second directory beside one of the first: a group, or tries, of its sample
HOSTS = ("127.0.0.1", "localhost", "[::1]")  # what a browser calls this machine
SECOND = "IoU of the second"
GAIN = "gain"  # of the second over the first


class Viewer:
    """Answers for one or two directories. Several threads may use it."""

    def __init__(self, directories: Sequence[pathlib.Path], processor: str = ""):
        """processor: a Hugging Face directory with the tokenizer; "" = the one that the run names. DataError where a
        directory is none."""
        self.indexes = [RowIndex(directory) for directory in directories]
        self.processor, self.lock = processor, threading.Lock()
        self.versions: list[int] = []
        self.all: list[Row] = []
        self.second: dict[str, list[Row]] = {}  # by sample
        self.summary: dict[str, Any] = {}

    @property
    def title(self) -> str:
        return " against ".join(str(index.directory) for index in self.indexes)

    def refresh(self) -> None:
        """Takes in what is new. A row gets the second directory's IoU of its sample, mean over what it has of it."""
        with self.lock:
            versions = [index.refresh() for index in self.indexes]
            if versions == self.versions:
                return
            self.versions, self.second = versions, {}
            self.all = list(self.indexes[0].rows.values())
            for index in self.indexes[1:]:
                for row in index.rows.values():
                    self.second.setdefault(row.sample, []).append(row)
                self.all = [self._joined(row) for row in self.all]
            self.summary = {
                "version": versions,
                "total": len(self.all),
                "names": list(dict.fromkeys(name for row in self.all for name in row.values)),
                "statuses": sorted({row.status for row in self.all}),
                "sources": sorted({row.source for row in self.all}),
                "notes": [note for index in self.indexes for note in index.notes()],
            }

    def _joined(self, row: Row) -> Row:
        ious = [r.values["iou"] for r in self.second.get(row.sample, ()) if "iou" in r.values]
        if not ious or "iou" not in row.values:
            return row
        second = sum(ious) / len(ious)
        return dataclasses.replace(row, values=row.values | {SECOND: second, GAIN: second - row.values["iou"]})

    def rows(self, asked: Mapping[str, str]) -> dict[str, Any]:
        """A page of what a query (rows.select_rows) asks for, and what can be asked. DataError for one that is none."""
        self.refresh()
        found = select_rows(self.all, asked)
        try:
            start = PAGE * max(0, int(asked.get("page") or 0))
        except ValueError:
            raise DataError(f"page={asked['page']} is no number") from None
        shown = [row.to_json() for row in found[start : start + PAGE]]
        return self.summary | {"found": len(found), "start": start, "rows": shown}

    def trajectory(self, key: str) -> str:
        """The markup of a trajectory, and beside it those of its sample in the second directory. DataError for a key
        that there is not."""
        row = self._row(key)
        sides = [(row, self.indexes[0])]
        for other in self.indexes[1:]:
            by_step = lambda r: abs(r.values.get("step", 0) - row.values.get("step", 0))  # noqa: E731
            sides += [(r, other) for r in sorted(self.second.get(row.sample, ()), key=by_step)[:SHOWN]]
        shown = [(r, index.example(r), index.directory) for r, index in sides]
        return render_page("trajectory.html", row=row, sides=shown, paired=len(self.indexes) > 1)

    def tokens(self, key: str) -> str:
        """The markup of a stored trajectory's tokens. DataError where there are none, or no tokenizer is known."""
        record = self.indexes[0].record(row := self._row(key))
        if record is None:
            raise DataError("tokens are kept by collections and by grpo.dump_every alone")
        from rsagent_jax.data.processor import Processor
        from rsagent_jax.data.trajectories import decode_record
        from rsagent_jax.models.qwen25_vl.load import processor_directory
        from rsagent_jax.report.tokens import shown_tokens

        processor = Processor.load(processor_directory(self.processor or self._named_processor(row)))
        return render_page("trajectory_tokens.html", parts=shown_tokens(decode_record(record, processor), processor))

    def _row(self, key: str) -> Row:
        if (row := self.indexes[0].rows.get(key)) is None:
            raise DataError(f"there is no trajectory {key!r}")
        return row

    def _named_processor(self, row: Row) -> str:
        """What the work directory of a row says that its tokens are of."""
        root = self.indexes[0].directory
        for folder in (root, root / row.source.split("/")[0], root.parent.parent):  # of one of its dumps
            if (folder / "attempts").is_dir():
                settings = settings_of(folder / "attempts")
                return settings["teacher"].get("own", {}).get("weights") or settings["processor"]
            if (folder / "config.json").exists():
                return read_json(folder / "config.json")["policy"]["weights"]
        raise DataError("which tokenizer its tokens are of is not said beside it: give --processor=DIR")


def page_of(viewer: Viewer, embedded: dict[str, Any]) -> str:
    """embedded: what the page need not ask for."""
    return render_page("view.html", title=viewer.title, scripts=["page.js", "view.js"], embedded=embedded)


def export_page(viewer: Viewer, asked: Mapping[str, str], limit: int) -> tuple[str, int, int]:
    """The page with the first so many rows of a query in it, how many they are, and of how many. DataError for a query
    that names what no row has."""
    viewer.refresh()
    _check_names(viewer.summary, asked)
    found = select_rows(viewer.all, asked)
    shown = found[:limit]
    embedded = viewer.summary | {"rows": [row.to_json() for row in shown], "left_out": len(found) - len(shown)}
    embedded["trajectories"] = {row.key: viewer.trajectory(row.key) for row in shown}
    return page_of(viewer, embedded), len(shown), len(found)


def _check_names(summary: Mapping[str, Any], asked: Mapping[str, str]) -> None:
    named = {asked.get("sort", "").removeprefix("-"), *asked.keys() - {*WORDS}}
    for what, names, there in (
        ("value", named, summary["names"]),
        ("ending", {asked.get("status", "")}, summary["statuses"]),
        ("source", {asked.get("source", "")}, summary["sources"]),
    ):
        for name in sorted(names - {"", *there}):
            raise DataError(
                f"--query: no trajectory has the {what} {name!r}{closest(name, there)}; there are {', '.join(there)}"
            )


class _Handler(http.server.BaseHTTPRequestHandler):
    """GET of four addresses, by browsers that call this machine by its own name."""

    server: "_Server"

    def do_GET(self) -> None:
        viewer, address = self.server.viewer, urllib.parse.urlsplit(self.path)
        asked = dict(urllib.parse.parse_qsl(address.query))
        host = re.sub(r":\d+$", "", self.headers.get("Host", ""))
        if host not in HOSTS:  # a page elsewhere, under a name of its own that was made to lead here
            return self._answer(HTTPStatus.FORBIDDEN, "text/plain", "ask for localhost or 127.0.0.1")
        answers = {
            "/": lambda: ("text/html", page_of(viewer, {})),
            "/rows": lambda: ("application/json", json.dumps(viewer.rows(asked))),
            "/trajectory": lambda: ("text/html", viewer.trajectory(asked.get("row", ""))),
            "/tokens": lambda: ("text/html", viewer.tokens(asked.get("row", ""))),
        }
        if address.path not in answers:
            return self._answer(HTTPStatus.NOT_FOUND, "text/plain", "there is nothing here")
        try:
            self._answer(HTTPStatus.OK, *answers[address.path]())
        except DataError as error:
            self._answer(HTTPStatus.BAD_REQUEST, "text/plain", str(error))

    def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
        content = text.encode(errors="replace")
        self.send_response(status)
        headers = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(content))}
        headers |= {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        if self.path.startswith(("/trajectory", "/tokens")):  # a part of the page, which has a policy of its own
            headers["Content-Security-Policy"] = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        for name, value in headers.items():
            self.send_header(name, value)
        with contextlib.suppress(ConnectionError):  # the browser asks for something else by now
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, viewer: Viewer, port: int):
        self.viewer = viewer
        super().__init__(("127.0.0.1", port), _Handler)


def serve(viewer: Viewer, port: int) -> _Server:
    """A server that listens on the loopback interface; its `serve_forever` is the caller's. 0: a free port.

    DataError where the port is taken.
    """
    try:
        return _Server(viewer, port)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"--port={port} cannot be listened on ({why}); give another") from None
