"""Who may reach the demo: loopback, or TLS and users; what is missing is one error."""

import base64
import collections
import concurrent.futures
import contextlib
import importlib
import importlib.util
import json
import pathlib
import re
import subprocess
import threading
import types

import pytest
from agent_fakes import DiscSegmenter
from PIL import Image

from rsagent_jax import demo
from rsagent_jax.agent.correction import THOUGHT
from rsagent_jax.api import Agent
from rsagent_jax.rollout.policy import TextPolicy
from rsagent_jax.runtime import command
from rsagent_jax.tiny import scenes
from rsagent_jax.web.visit import read_places
from tests.refusals import refused
from tests.rollout import small

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio.queueing")  # pandas, of Gradio's own


def access(address, auth="", cert="", key="", insecure=False):
    return demo.check_access(address, str(auth), str(cert), str(key), insecure)


def test_other_machines_need_tls_and_a_user(tmp_path, monkeypatch, capsys):
    cert, key, users = (tmp_path / name for name in ("cert.pem", "key.pem", "users.txt"))
    openssl = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    subprocess.run([*openssl.split(), "-keyout", key, "-out", cert], check=True, capture_output=True)
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
    users.write_text("ada:one\nbob:two\nada :three\n")
    refused("users.txt holds a name twice", access, "127.0.0.1:0", users)
    users.write_bytes("ada:Grün".encode("latin-1"))
    refused("the --auth file .*users.txt is not UTF-8: save it", access, "127.0.0.1:0", users)
    refused("TLS needs both", access, "127.0.0.1:0", "", users)
    refused("--tls_cert=.*users.txt and --tls_key=.*users.txt are no cert", access, "127.0.0.1:0", "", users, users)
    refused("is not host:port", access, "7860")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = command.parse_arguments(demo.main, [])[1]["config"]
    refused(r"pip install -e '\.\[web\]'", demo.main, config)


def test_places_and_words_of_a_visitor():
    assert read_places(" 3, 4.5 ") == [3.0, 4.5] and read_places("1 2;3,4") == [1.0, 2.0, 3.0, 4.0]
    for text in ("", "1", "1,2,3", "x, y", "1e999, nan 2"):
        refused("is no place", read_places, text)
    said = "The tiny policy was never trained on “mug”, “big”."
    assert scenes.unknown_words("every red star left of the Mug, the big mug") == said
    assert scenes.unknown_words("the bottommost yellow one") == ""


@contextlib.contextmanager
def opened(folder, users=(), agent=None, slots=1, per_minute=30):
    """The page, a client of it, and call(handler, *data): the messages of that event, as a browser gets them."""
    pytest.importorskip("gradio")
    from starlette.testclient import TestClient

    from rsagent_jax.web import page, server

    there = concurrent.futures.Future()
    shown = page.DemoPage(there, page.Limits(slots, 8, per_minute, 1, 25), folder)
    app = server.mount_page(shown, users, "127.0.0.1:0")

    def call(name, *data, visit="visit"):
        number = next(d["id"] for d in client.get("/config").json()["dependencies"] if d["api_name"] == name)
        event = {"data": data, "fn_index": number, "session_hash": visit}
        client.post("/gradio_api/queue/join", json=event).raise_for_status()
        lines = client.get(f"/gradio_api/queue/data?session_hash={visit}").text.splitlines()
        return [json.loads(line.removeprefix("data: ")) for line in lines if line]

    with contextlib.ExitStack() as ended:
        if agent is not None:
            there.set_result(ended.enter_context(agent))
        client = ended.enter_context(TestClient(app, base_url="http://127.0.0.1:7860"))
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
    content = pathlib.Path(picture(tmp_path)["path"]).read_bytes()
    data = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    with opened(tmp_path) as (_, _, call):
        assert not succeeded(call("begin", upload("https://host.example/huge.png"), "the mug"))
        assert not succeeded(call("begin", None, upload("https://host.example/huge.png")))
        assert not succeeded(call("begin", {**upload(""), "path": None, "url": data}, "the mug"))
    assert not fetched and not [file for file in (tmp_path / "gradio").rglob("*") if file.is_file()]


def answering(*texts, act=None):
    """An agent that writes these turns: after a correction, those from its number on."""
    script = lambda task, state: texts[min(len(state.turns), len(texts) - 1)]  # noqa: E731
    policy = TextPolicy(act or script, small.processor(), slots=1)
    return Agent(policy, DiscSegmenter(), small.processor(), small.AGENT)


def visitor(name="ada"):
    return types.SimpleNamespace(session_hash=name, username=None, client=types.SimpleNamespace(host=name))


def picture(folder, size=(60, 40)):
    path = folder / "picture.png"
    Image.new("1", size).save(path)
    return {"path": str(path)}


PAGE = types.SimpleNamespace(ADD="Add what I click", NEW="New mask of what I click", BOX="Box: two corners")
TURNS = (small.click(30, 40), small.click(50, 50), small.finish(2))


def told(call, *args):
    """What a visitor is told is wrong."""
    with pytest.raises(importlib.import_module("gradio").Error) as caught:
        collections.deque(call(*args) or (), 0)
    return caught.value.message


def test_a_new_question_takes_the_place_of_the_one_under_way(tmp_path):
    ada = visitor()
    with opened(tmp_path, agent=answering(*TURNS)) as (shown, client, _):
        file = picture(tmp_path)
        shown.begin(file, "the mug", ada)
        running = shown.ask(ada)
        next(running)
        shown.begin(file, "the jug", ada)
        assert "finished after 3 turns" in list(shown.ask(ada))[-1][shown.status]
        assert list(running) == [] and shown.visits["ada"].result.state.query == "the jug"
        for query in ("the mug", "the jug"):  # one that waits for a slot yet
            shown.begin(file, query, ada)
        assert list(shown.ask(ada)) and shown.visits["ada"].result.state.query == "the jug"
        assert list(shown.ask(ada)) == []
        events = client.get("/config").json()["dependencies"]
    assert [event["trigger_mode"] for event in events if event["api_name"] == "ask"] == ["multiple"]


def test_a_correction_shows_its_own_masks_and_leaves_no_place_behind(tmp_path):
    ada = visitor()
    with opened(tmp_path, agent=answering(*TURNS[:2], small.finish(1))) as (shown, client, _):
        shown.begin(picture(tmp_path), "the mug", ada)
        assert list(shown.ask(ada))[-1][shown.pool].value == 1
        shown.begin_correction("5, 6, 50, 30", PAGE.BOX, ada)
        updates = list(shown.correct("5, 6, 50, 30", PAGE.BOX, 1, ada))
        assert updates[1][shown.pool].value == 3 and updates[-1][shown.pool].value == 1
        assert updates[-1][shown.places] == "" and shown.places not in updates[1]
        events = client.get("/config").json()["dependencies"]
        cleared = [e for e in events if e["targets"] == [[shown.how._id, "input"]]]
        assert [event["outputs"] for event in cleared] == [[shown.places._id]]

        shown.begin_correction("5, 6", PAGE.ADD, ada)
        running = shown.correct("5, 6", PAGE.ADD, 0, ada)
        next(running)
        shown.leave(ada)
        assert list(running) == []


def test_a_users_turn_is_known_by_its_number(tmp_path):
    ada = visitor()
    think = lambda turn: turn.replace(re.search("<think>(.*?)</think>", turn)[1], THOUGHT)  # noqa: E731
    texts = [think(small.zoom(5, 5, 40, 30)), think(small.click(10, 10)), small.finish(1)]
    with opened(tmp_path, agent=answering(*texts)) as (shown, _, _):
        shown.begin(picture(tmp_path, (112, 112)), "the mug", ada)
        list(shown.ask(ada))
        who = lambda: re.findall("<b>Turn (.*?)</b>", "".join(shown.visits["ada"].turns))  # noqa: E731
        assert who() == ["1, policy", "2, policy", "3, policy"]
        shown.begin_correction("5, 6", PAGE.NEW, ada)
        list(shown.correct("5, 6", PAGE.NEW, 0, ada))
        assert who() == ["1, policy", "2, policy", "3, you", "4, you", "5, policy"]
        assert "reset_view" in shown.visits["ada"].turns[2]


def test_what_a_visitor_gives_wrongly_is_told_without_a_path(tmp_path):
    ada = visitor()
    with opened(tmp_path, agent=answering(*TURNS)) as (shown, _, _):
        file = picture(tmp_path, (5001, 5000))
        assert "5001 x 5000 pixels; 25 megapixels are the most" in told(shown.begin, file, "the mug", ada)
        whole = pathlib.Path(file["path"]).read_bytes()
        for content, said in ((whole[: len(whole) // 2], "the picture is not"), (b"%PDF-1.7\n", "PDF")):
            bad = tmp_path / "cut.png"
            bad.write_bytes(content.replace(b"\0\0\x13\x89", b"\0\0\0\x89"))
            shown.begin({"path": str(bad)}, "the mug", ada)
            message = told(shown.ask, ada)
            assert said in message and "choose another picture" in message and str(tmp_path) not in message
        shown.begin({"path": str(tmp_path)}, "the mug", ada)
        assert "upload it again" in told(shown.ask, ada)

        shown.begin(picture(tmp_path), "the mug", ada)
        list(shown.ask(ada))
        assert "no place" in told(shown.correct, "here", PAGE.ADD, 1, ada)
        assert "no mask 9" in told(shown.correct, "5, 6", PAGE.ADD, 9, ada)
        assert "no mask 1.5" in told(shown.show, 1.5, ada)


def test_an_agent_that_fails_ends_the_status_line(tmp_path):
    def act(task, state):
        raise RuntimeError("boom")

    with opened(tmp_path, agent=answering(act=act)) as (shown, _, _):
        shown.begin(picture(tmp_path), "the mug", visitor())
        updates = shown.ask(visitor())
        assert "looks at" in next(updates)[shown.status]
        assert "No answer: the agent failed (RuntimeError)" in next(updates)[shown.status]
        with pytest.raises(RuntimeError, match="boom"):
            next(updates)


def test_visitors_share_what_is_kept_and_are_counted_one_by_one(tmp_path):
    class Slow(collections.deque):
        def __iter__(self):
            for item in super().__iter__():
                if not threads:
                    threads.append(threading.Thread(target=lambda: refused_.append(told(shown._count, visitor()))))
                    threads[0].start()
                    threads[0].join(0.2)
                yield item

    threads, refused_ = [], []
    with opened(tmp_path, agent=answering(*TURNS), per_minute=2) as (shown, _, _):
        file = picture(tmp_path)
        for name in "abcdefg":
            shown.begin(file, "the mug", visitor(name))
            list(shown.ask(visitor(name)))
        assert list(shown.visits) == list("cdefg")
        shown.asked = Slow()
        shown._count(visitor())
        shown._count(visitor())
        threads[0].join()
        assert len(shown.asked) == 2 and "2 questions a minute" in refused_[0]


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
