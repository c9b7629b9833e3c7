"""A Hugging Face hub on loopback, as far as downloads go: repositories, revisions, gates, broken wires."""

import contextlib
import dataclasses
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclasses.dataclass
class Hub:
    """`files` of repository "org/name" by name; every revision in `revisions` is the commit SHA."""

    files: dict[str, dict[str, bytes]]
    revisions: tuple[str, ...] = ("main", SHA)
    gated: bool = False
    token: str = ""  # that opens the gate
    cut_after: int = 0  # bytes of a file's body, then the wire breaks; once for each element of `cuts`
    cuts: int = 0
    damaged: bool = False
    sent: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)  # file, first byte, bytes
    url: str = ""


def _answer(hub: Hub, handler: BaseHTTPRequestHandler) -> None:
    path = handler.path.partition("?")[0]
    if info := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(?:revision|tree)/([^/]+)", path):
        repository, revision = info.groups()
    elif info := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
        repository, revision = info[1], info[2]
    else:
        return _refuse(handler, 404, "EntryNotFound")
    if repository not in hub.files:
        return _refuse(handler, 401, "RepoNotFound")
    if hub.gated and handler.headers.get("Authorization") != f"Bearer {hub.token}":
        return _refuse(handler, 403, "GatedRepo")
    if revision not in hub.revisions:
        return _refuse(handler, 404, "RevisionNotFound")
    files = hub.files[repository]
    if "/revision/" in path:
        return _send(handler, json.dumps({"id": repository, "sha": SHA, "siblings": []}).encode())
    if "/tree/" in path:
        rows = [
            {
                "type": "file",
                "path": name,
                "oid": hashlib.sha1(body).hexdigest(),
                "size": len(body),
                "lfs": {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 100},
            }
            for name, body in files.items()
        ]
        return _send(handler, json.dumps(rows).encode())
    name = info[3]
    return _send_file(hub, handler, name, files[name]) if name in files else _refuse(handler, 404, "EntryNotFound")


def _send_file(hub: Hub, handler: BaseHTTPRequestHandler, name: str, body: bytes) -> None:
    sum_ = hashlib.sha256(body).hexdigest()
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
    first = int(asked[1]) if asked else 0
    headers = {"ETag": f'"{sum_}"', "X-Linked-Etag": f'"{sum_}"', "X-Linked-Size": str(len(body))}
    headers |= {"X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
    if asked:
        headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
    part = body[first:]
    if hub.damaged:
        part = part[:-1] + bytes([part[-1] ^ 1])
    cut = hub.cut_after if hub.cuts and handler.command == "GET" and len(part) > hub.cut_after else 0
    if handler.command == "GET":  # noted before a client has it, and goes on
        hub.sent.append((name, first, cut or len(part)))
    _send(handler, part[:cut] if cut else part, 206 if asked else 200, headers, len(part))
    if cut:
        hub.cuts -= 1
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_RDWR)


def _send(handler, body: bytes, status: int = 200, headers=(), length: int | None = None) -> None:
    handler.send_response(status)
    for key, value in dict(headers).items():
        handler.send_header(key, value)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(body)


def _refuse(handler, status: int, code: str) -> None:
    _send(handler, b"{}", status, {"X-Error-Code": code, "X-Error-Message": code})


@contextlib.contextmanager
def serve_hub(**options) -> Iterator[Hub]:
    """Answers at `hub.url` as long as the block lasts."""
    hub = Hub(**options)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            _answer(hub, self)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
