"""The remote teacher against a local HTTP server that plays good, malformed, slow and failing answers."""

import concurrent.futures
import contextlib
import http.server
import json
import threading
import time
import types

import numpy as np
import pytest
from agent_fakes import DiscSegmenter

from rsagent_jax.agent import environment
from rsagent_jax.agent.tools import Finish, Segment, render_call
from rsagent_jax.agent.views import PixelLimits
from rsagent_jax.collecting import endpoint
from rsagent_jax.config.schema import AgentConfig, RemoteConfig, TeacherConfig
from rsagent_jax.rollout.policy import PolicyFailure
from rsagent_jax.types import DataError, Status
from tests.refusals import refused

LIMITS = PixelLimits(28, 56 * 56, 560 * 560)
CLICK = render_call(Segment(points=((30.0, 30.0),), labels=(1,)), "here")
DONE = render_call(Finish(1), "done")


def good(text, usage=True):
    answer = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
    answer["choices"] = [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}]
    if usage:
        answer["usage"] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return 200, {}, json.dumps(answer)


class Server:
    """Answers request after request from a list of (status, headers, body); remembers them."""

    def __init__(self, answers):
        self.answers, self.asked, self.times, self.most, self.now = list(answers), [], [], 0, 0
        self.lock = threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer.lock:
                    outer.asked.append(body)
                    outer.times.append(time.monotonic())
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                    answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                status, headers, text = answer(body) if callable(answer) else answer
                time.sleep(float(headers.pop("sleep", 0)))
                with outer.lock:  # before a client has the answer, and asks again
                    outer.now -= 1
                self.send_response(status)
                for name, value in {"content-type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(text.encode()) + int(headers.get("x-lie", 0))))
                self.end_headers()
                pause = float(headers.get("x-pause", 0))  # after each byte
                with contextlib.suppress(OSError):
                    for piece in text if pause else [text]:
                        self.wfile.write(piece.encode())
                        time.sleep(pause)
                self.close_connection = "x-lie" in headers

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


def config(server, **options):
    return RemoteConfig(**dict(url=server.url, model="m", backoff_s=0.01, retries=2, timeout_s=5.0) | options)


def ask(c, n=1):
    """(answers or errors of n requests at a time, usage)."""
    shared = endpoint.Endpoint.shared(c)
    assert endpoint.Endpoint.shared(c) is shared

    def one(_):
        try:
            return shared.complete([{"role": "user", "content": "?"}]).text
        except (PolicyFailure, DataError) as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(n) as pool:
        return list(pool.map(one, range(n))), shared.usage


def test_a_trajectory_is_played_and_the_teacher_sees_what_the_policy_sees():
    image = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    with Server([good(CLICK + "<|im_end|>"), good("<|im_start|> nonsense"), good(DONE)]) as server:
        teacher = endpoint.Remote(TeacherConfig(remote=config(server, price_in=2.0, price_out=10.0)), None)
        state = environment.reset(image, "the disc", AgentConfig(prompt="brief", history_size=56), LIMITS)

        while state.status is None:
            proposal = environment.propose(state, teacher.act(state, None))
            state = environment.apply_reply(state, proposal, environment.run_tool(DiscSegmenter(), state, proposal))
    usage = endpoint.Endpoint.shared(teacher.config).usage
    assert state.status is Status.FINISHED and [t.text for t in state.turns] == [CLICK, "(|im_start|> nonsense", DONE]
    assert (usage.requests, usage.retries, usage.tokens_in, usage.tokens_out) == (3, 0, 300, 30)
    assert endpoint.Endpoint.shared(teacher.config).told()["cost"] == pytest.approx((300 * 2 + 30 * 10) / 1e6)
    roles = [[m["role"] for m in body["messages"]] for body in server.asked]
    assert roles == [["system", "user"] + ["assistant", "user"] * n for n in range(3)]
    last = server.asked[-1]["messages"]
    kinds = [[part["type"] for part in m["content"]] for m in last if m["role"] == "user"]
    assert kinds == [["image_url", "text"], ["text", "image_url", "text"], ["text", "text"]]  # an error has no picture
    assert last[1]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert state.turns[0].observation.text in last[3]["content"][0]["text"] and last[2]["content"] == CLICK


@pytest.mark.parametrize(
    "bad",
    [
        (429, {"retry-after": "0.01"}, '{"error": {"message": "slow down"}}'),
        (500, {}, '{"error": {"message": "oops"}}'),
        (503, {}, "<html>"),
        (200, {}, '{"choices": [{"mess'),  # half a JSON
        (200, {}, '{"choices": []}'),
        (200, {}, "[]"),
        good("   "),
        (200, {"x-lie": "50"}, '{"cho'),  # the connection ends before the answer does
    ],
    ids=["rate limit", "server", "html", "half json", "no choices", "list", "no text", "cut connection"],
)
def test_what_may_pass_is_asked_again_and_counted(bad):
    with Server([bad, good("yes")]) as server:
        got, usage = ask(config(server))
    assert got == ["yes"] and usage.retries == 1 and usage.requests == 2


@pytest.mark.parametrize(
    ("answer", "kind", "tries"),
    [
        ((429, {"retry-after": "0"}, "{}"), "rate_limit", 3),
        ((500, {}, "{}"), "server", 3),
        ((200, {}, "{"), "malformed", 3),
        ((400, {}, '{"error": {"message": "too long"}}'), "refused", 1),
        ((200, {"x-pause": "0.05"}, " " * 60), "timeout", 3),  # a byte now and then
    ],
)
def test_what_does_not_pass_is_given_up_with_a_kind(answer, kind, tries):
    with Server([answer]) as server:
        (error,), _ = ask(config(server, timeout_s=1.0 if kind == "timeout" else 5.0))
    assert isinstance(error, PolicyFailure) and error.kind == f"endpoint, {kind}" and len(server.asked) == tries


def test_nobody_there_is_given_up_and_a_wrong_key_ends_the_command():
    with Server([good("x")]) as server:
        gone = config(server)
    (error,), _ = ask(gone)
    assert isinstance(error, PolicyFailure) and error.kind == "endpoint, connection"
    for status in (401, 403, 404):
        with Server([(status, {}, '{"error": {"message": "no such model"}}')]) as server:
            (error,), _ = ask(config(server))
        assert isinstance(error, DataError) and "no such model" in str(error) and len(server.asked) == 1
    refused(r"teacher\.remote\.url", endpoint.Endpoint.shared, RemoteConfig())


def test_requests_run_side_by_side_within_both_limits(monkeypatch):
    def slowly(_):
        return 200, {"sleep": "0.1"}, good("x")[2]

    with Server([slowly]) as server:
        got, _ = ask(config(server, concurrent=4), n=8)
        assert got == ["x"] * 8 and 2 <= server.most <= 4
    start = time.monotonic()
    monkeypatch.setattr("rsagent_jax.rollout.endpoint.time", types.SimpleNamespace(monotonic=lambda: start))
    with Server([good("x")]) as server:
        _, usage = ask(config(server, per_minute=600.0), n=5)
        # one each 0.1 s; the first at once
        assert server.times[-1] - start >= 0.4 and usage.waited_s == pytest.approx(1.0)
