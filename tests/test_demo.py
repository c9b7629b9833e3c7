"""Who may reach the demo: loopback, or TLS and users; what is missing is one error."""

import concurrent.futures
import contextlib
import importlib.util
import json

import pytest

from rsagent_jax import demo
from rsagent_jax.runtime import command
from rsagent_jax.web.visit import read_places, unknown_words
from tests.refusals import refused

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio.queueing")  # pandas, of Gradio's own


def access(address, auth="", cert="", key="", insecure=False):
    return demo.check_access(address, str(auth), str(cert), str(key), insecure)


def test_other_machines_need_tls_and_a_user(tmp_path, monkeypatch, capsys):
    cert, key, users = (tmp_path / name for name in ("cert.pem", "key.pem", "users.txt"))
    cert.touch()
    key.touch()
    users.write_text("ada:secret\n\nbob:with:colon \n")
    both = [("ada", "secret"), ("bob", "with:colon")]
    assert access("127.0.0.1:0") == [] and access("localhost:0", users) == both
    refused("can be reached from other machines: give --tls_cert and --tls_key and --auth, listen", access, "0.0.0.0:0")
    refused("give --tls_cert and --tls_key, listen on 127.0.0.1", access, "0.0.0.0:0", users)
    refused("give --auth, listen on 127.0.0.1", access, "0.0.0.0:0", "", cert, key)
    assert capsys.readouterr().out == ""
    assert access("0.0.0.0:0", users, cert, key) == both and capsys.readouterr().out == ""
    assert access("0.0.0.0:0", insecure=True) == []
    assert "warning: 0.0.0.0:0 can be reached from other machines" in capsys.readouterr().out
    monkeypatch.setenv(demo.AUTH, "eve:x")
    assert access("127.0.0.1:0") == [("eve", "x")]


def test_what_cannot_be_used_is_named(tmp_path, monkeypatch):
    users = tmp_path / "users.txt"
    refused("the --auth file .*users.txt cannot be read", access, "127.0.0.1:0", users)
    users.write_text("ada\n")
    refused("users.txt must hold name:password", access, "127.0.0.1:0", users)
    users.write_text("\n")
    refused("users.txt must hold name:password", access, "127.0.0.1:0", users)
    refused("TLS needs both", access, "127.0.0.1:0", "", users)
    refused("is not host:port", access, "7860")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = command.parse_arguments(demo.main, [])[1]["config"]
    refused(r"pip install 'rsagent-jax\[web\]'", demo.main, config)


def test_places_and_words_of_a_visitor():
    assert read_places(" 3, 4.5 ") == [3.0, 4.5] and read_places("1 2;3,4") == [1.0, 2.0, 3.0, 4.0]
    for text in ("", "1", "1,2,3", "x, y", "1e999, nan 2"):
        refused("is no place", read_places, text)
    assert unknown_words("every red star left of the Mug, the mug") == ["mug"]
    assert unknown_words("the bottommost yellow one") == []


@contextlib.contextmanager
def opened(folder, users=(), **limits):
    """The page, a client of it, and call(handler, *data): the messages of that event, as a browser gets them."""
    pytest.importorskip("gradio")
    from starlette.testclient import TestClient

    from rsagent_jax.web import page, server

    shown = page.DemoPage(concurrent.futures.Future(), page.Limits(1, 8, 30, 1, **limits), folder)
    app = server.mount_page(shown, users, "127.0.0.1:0")

    def call(name, *data, visit="visit"):
        number = next(d["id"] for d in client.get("/config").json()["dependencies"] if d["api_name"] == name)
        event = {"data": data, "fn_index": number, "session_hash": visit}
        client.post("/gradio_api/queue/join", json=event).raise_for_status()
        lines = client.get(f"/gradio_api/queue/data?session_hash={visit}").text.splitlines()
        return [json.loads(line.removeprefix("data: ")) for line in lines if line]

    with TestClient(app, base_url="http://127.0.0.1:7860") as client:
        yield shown, client, call


def upload(path, **more):
    return {"path": str(path), "orig_name": "a.svg", "meta": {"_type": "gradio.FileData"}, **more}


def succeeded(messages):
    return next(message["success"] for message in messages if message["msg"] == "process_completed")


def test_a_visitor_reads_no_file_of_the_server(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    secret = tmp_path / "secret.svg"
    secret.write_text("password")
    with opened(tmp_path) as (_, client, call):
        assert not succeeded(call("begin", upload(secret), "the mug"))
        files = [file for file in (tmp_path / "gradio").rglob("*") if file.is_file()]
        assert not [file for file in files if file.read_text() == "password"]
        assert client.get(f"/gradio_api/file={secret}").status_code == 403


def test_a_picture_comes_by_upload_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    from gradio import processing_utils

    fetched = []
    monkeypatch.setattr(processing_utils.sh, "get", lambda url, **_: fetched.append(url))
    data = "data:image/png;base64," + "A" * 2**12
    with opened(tmp_path) as (_, _, call):
        assert not succeeded(call("begin", upload("https://host.example/huge.png"), "the mug"))
        assert not succeeded(call("begin", None, upload("https://host.example/huge.png")))
        assert not succeeded(call("begin", {**upload(""), "path": None, "url": data}, "the mug"))
    assert not fetched and not [file for file in (tmp_path / "gradio").rglob("*") if file.is_file()]


def test_the_page_is_for_its_users_and_under_this_machines_names(tmp_path):
    with opened(tmp_path, [("ada", "secret")]) as (_, client, _):
        assert client.get("/", headers={"Host": "evil.example:7860"}).status_code == 400
        assert "What to segment" not in client.get("/").text and client.get("/config").status_code == 401
        assert client.post("/login", data={"username": "ada", "password": "wrong"}).status_code == 400
        assert client.post("/login", data={"username": "ada", "password": "secret"}).status_code == 200
        config = client.get("/config").json()
        assert "What to segment" in client.get("/").text
    assert not config["analytics_enabled"] and not config["footer_links"]
    assert config["max_file_size"] == 2**20 and not config["run_history"]
