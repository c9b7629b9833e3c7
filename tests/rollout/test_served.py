"""The policy behind an endpoint against a server of scripts: what it is asked, what it may answer, what is refused."""

import base64
import dataclasses
import io
import json
import threading

import numpy as np
import pytest
from agent_fakes import DiscSegmenter
from PIL import Image

import evaluate
from rsagent_jax.agent import environment
from rsagent_jax.agent.views import PixelLimits
from rsagent_jax.config.build import build_config
from rsagent_jax.config.schema import (
    EndpointConfig,
    EvalConfig,
    PolicyConfig,
    SamplingConfig,
    SegmentConfig,
    TrainConfig,
)
from rsagent_jax.data.processor import Processor
from rsagent_jax.data.serving import write_serving_files
from rsagent_jax.models.qwen25_vl.load import copy_policy_files, weights_checksum
from rsagent_jax.rollout import startup
from rsagent_jax.rollout.driver import Driver
from rsagent_jax.rollout.open import open_policy
from rsagent_jax.rollout.play import failure_of
from rsagent_jax.rollout.policy import Request, TextPolicy
from rsagent_jax.types import Status
from tests.collecting.test_endpoint import Server, good
from tests.refusals import refused
from tests.rollout import small

SAMPLING = SamplingConfig(temperature=0.0, context=2000, max_new_tokens=60, slots=2)
SCRIPT = ["nonsense", *small.THREE_IMAGES]


def policy_config(server, **remote):
    remote = EndpointConfig(**dict(url=server.url, model="m", backoff_s=0.001, retries=1, timeout_s=5.0) | remote)
    return PolicyConfig(weights=str(small.weights()), backend="openai", remote=remote)


def play(server, task=None, sampling=SAMPLING, processor=None, **remote):
    processor = processor or small.processor()
    policy = open_policy(policy_config(server, **remote), processor, sampling, small.AGENT, 0)
    driver = Driver(policy, DiscSegmenter(), processor, small.AGENT)
    ((trajectory, state),) = driver.run([task or small.task(0)])
    policy.release_memory()
    return trajectory, state


def turn(body) -> str:
    return SCRIPT[sum(m["role"] == "assistant" for m in body["messages"])]


def scripted_policy(script=SCRIPT):
    return TextPolicy(lambda task, state: script[len(state.turns)], small.processor(), context=2000)


def test_what_a_server_makes_of_the_messages_are_the_ids_of_our_own_policy(tmp_path):
    """transformers' processor of an export, given the messages as its server gives them: the opening, a malformed call,
    overlays and a zoom; the ids and the number that the policy expects are those of the trajectory."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    copy_policy_files(small.weights(), tmp_path)
    write_serving_files(small.weights(), tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert processor.chat_template == (tmp_path / "chat_template.jinja").read_text().rstrip("\n")
    bodies = []

    def answer(body):
        bodies.append(body)
        return good(turn(body), usage=False)

    with Server([answer]) as server:
        trajectory, _ = play(server)
    ((wanted, _),) = Driver(scripted_policy(), DiscSegmenter(), small.processor(), small.AGENT).run([small.task(0)])
    np.testing.assert_array_equal(trajectory.tokens, wanted.tokens)
    np.testing.assert_array_equal(trajectory.positions, wanted.positions)
    assert trajectory.status is Status.FINISHED and not trajectory.logprobs.any()
    ends = np.flatnonzero(np.diff(np.append(wanted.loss_mask, False).astype(int)) == 1) + 1  # of what is forced
    assert len(bodies) == len(ends) == 5 and len(wanted.grids) == 4
    for body, end in zip(bodies, ends, strict=True):
        ids = processor.apply_chat_template(
            [{"role": m["role"], "content": parts(m["content"])} for m in body["messages"]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )["input_ids"][0]
        np.testing.assert_array_equal(ids, wanted.tokens[:end])
        assert body["logit_bias"] == {str(small.processor().image_id + k): -100 for k in (0, 1)}
        assert body["temperature"] == 0 and "seed" not in body and 0 < body["max_tokens"] <= 60


def parts(content):
    """As transformers.cli.serving.utils has them for its processor."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    image = lambda url: Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))  # noqa: E731
    return [p if p["type"] == "text" else {"type": "image", "image": image(p["image_url"]["url"])} for p in content]


def counted(body, tokens):
    status, headers, text = good(turn(body))
    answer = json.loads(text)
    answer["usage"]["prompt_tokens"] = tokens
    return status, headers, json.dumps(answer)


def test_a_server_that_reads_another_prompt_ends_the_command_at_the_first_turn():
    ((wanted, _),) = Driver(scripted_policy(), DiscSegmenter(), small.processor(), small.AGENT).run([small.task(0)])
    opening = int(np.flatnonzero(wanted.loss_mask)[0])
    with Server([lambda body: counted(body, opening if len(body["messages"]) == 2 else 7)]) as server:
        refused(f"{server.url} reads a prompt of 7 tokens where .* other|serve the directory", play, server)
    assert len(server.asked) == 2  # the first turn was right


def test_a_shape_that_servers_enlarge_is_a_failure_of_its_own_trajectory():
    p = small.processor()
    squares = dataclasses.replace(p.images, limits=PixelLimits(28, 112 * 112, 112 * 112))
    with Server([lambda body: counted(body, 7)]) as server:
        _, state = play(server, small.task(0, h=20, w=300), processor=Processor(p.tokenizer, squares, p.config))
    kind, why = failure_of(state)
    assert state.status is Status.POLICY_FAILED and kind == "endpoint, picture" and "300x20" in why


def test_a_server_that_fails_is_a_counted_failure():
    """What else it may fail with, tests/collecting/test_endpoint.py has."""
    with Server([(500, {}, "{}")]) as server:
        _, state = play(server)
    assert failure_of(state)[0] == "endpoint, server" and "after 2 tries" in failure_of(state)[1]


def test_a_turn_of_nothing_but_its_end_is_malformed_as_in_the_engine():
    with Server([lambda body: good("" if len(body["messages"]) == 2 else turn(body), usage=False)]) as server:
        trajectory, _ = play(server)
    script = ["", *SCRIPT[1:]]
    ((wanted, _),) = Driver(scripted_policy(script), DiscSegmenter(), small.processor(), small.AGENT).run(
        [small.task(0)]
    )
    np.testing.assert_array_equal(trajectory.tokens, wanted.tokens)
    assert trajectory.status is Status.FINISHED and trajectory.turns[0].error is not None and len(server.asked) == 5
    half = good("", usage=False)[2].replace('"stop"', '"length"')
    with Server([lambda body: (200, {}, half)]) as server:
        assert failure_of(play(server)[1])[0] == "endpoint, malformed"


def test_a_released_turn_ends_its_request():
    """One request at a time: the next one is answered while the server still holds the first."""
    gate, task, p = threading.Event(), small.task(0), small.processor()
    state = environment.reset(task.sample.image, task.sample.query, small.AGENT, p.images.limits)
    late = lambda body: (gate.wait(30), good("late"))[1]  # noqa: E731
    with Server([late, good("here", usage=False), late]) as server:
        policy = open_policy(policy_config(server, concurrent=1, timeout_s=60.0), p, SAMPLING, small.AGENT, 0)
        held, next_one = (Request(slot, None, 0, state, task, 0) for slot in (0, 1))
        policy.submit(held)
        while not server.asked:
            threading.Event().wait(0.01)
        _, asked = policy.turns[0]
        policy.release(0)
        assert asked.cancelled()
        policy.submit(next_one)
        ((slot, completion),) = policy.step()
        assert (slot, p.decode(completion.tokens)) == (1, "here<|im_end|>") and not gate.is_set()
        policy.submit(held)
        _, asked = policy.turns[0]
        policy.release_memory()
        assert asked.cancelled()
        gate.set()


def test_nothing_is_played_where_the_model_is_not_served(monkeypatch):
    def check(server, **remote):
        return startup.check_policy(policy_config(server, **remote), small.AGENT, SAMPLING)

    with Server([(404, {}, '{"error": {"message": "no model m"}}')]) as server:
        refused("does not serve 'm' .*no model m.*; see policy.remote", check, server)
    with Server([(400, {}, '{"detail": "pinned to n"}')]) as server:
        refused("does not serve 'm' .*pinned to n.*; see policy.remote", check, server)
    refused("does not serve 'm' .*onnection", check, server, url="http://127.0.0.1:9/v1")  # nobody listens there
    with Server([lambda body: (200, {"sleep": 1}, "{}")]) as server:
        refused("does not serve 'm'", check, server, timeout_s=0.2)
    with Server([(200, {}, "{")]) as server:
        refused("does not serve 'm' .*; see policy.remote", check, server)
    with Server([good("")]) as server:
        monkeypatch.setenv("ODD_KEY", "schl\u00fcssel")
        refused("does not serve 'm' .*ascii.*; see policy.remote", check, server, key_variable="ODD_KEY")
        assert not server.asked
        for url in (server.url.removeprefix("http://"), "localhost:8000/v1", "ftp://h/v1", "http:///v1"):
            refused("policy.remote.url must be like http://host:8000/v1", check, server, url=url)
        said = refused("holds a user or a password.*policy.remote.key_var", check, server, url="http://me:secret@h/v1")
        assert "secret" not in said
        assert "budget of 2000 tokens" in check(server) and len(server.asked) == 1


def test_a_turn_that_its_budget_cut_is_unfinished_and_placeholders_become_text():
    def answer(body):
        if len(body["messages"]) > 2:
            return good(turn(body), usage=False)
        status, headers, said = good("<think>see <|image_pad|><|box_start|>" + "a" * 500, usage=False)
        return status, headers, said.replace('"stop"', '"length"')

    with Server([answer]) as server:
        trajectory, _ = play(server)
    first = trajectory.turns[0]
    assert first.text.startswith("<think>see (|image_pad|><|box_start|>aaa") and first.error is not None
    assert trajectory.status is Status.FINISHED and server.asked[0]["max_tokens"] == 60
    sampled = np.flatnonzero(trajectory.loss_mask)
    assert trajectory.tokens[sampled[59]] != small.processor().terminator_id and sampled[60] > sampled[59] + 1


def test_what_is_drawn_depends_on_the_task_and_the_turn():
    warm = dataclasses.replace(SAMPLING, temperature=0.5, top_p=0.9)
    with Server([lambda body: good(turn(body), usage=False)]) as server:
        for uid in (0, 0, 1):
            play(server, small.task(0, uid), warm)
        play(server, dataclasses.replace(small.task(0), temperature=0.0), warm)
    seeds = [body.get("seed") for body in server.asked]
    assert seeds[:5] == seeds[5:10] and len({*seeds[:5], *seeds[10:15]}) == 10 and seeds[15:] == [None] * 5
    assert {body["temperature"] for body in server.asked[:15]} == {0.5} and server.asked[0]["top_p"] == 0.9


def test_an_answer_is_put_together_where_the_server_took_thought_and_call_out():
    def answer(body):
        text, made = turn(body), json.loads(good("")[2])
        if "<tool_call>" in text:
            call = json.loads(text.split("<tool_call>")[1].split("</tool_call>")[0])
            function = {"name": call["name"], "arguments": json.dumps(call["arguments"])}
            message = {"role": "assistant", "content": "", "reasoning_content": text.split("<think>")[1].split("<")[0]}
            message["tool_calls"] = [{"id": "0", "type": "function", "function": function}]
        else:
            message = {"role": "assistant", "content": text}
        made["choices"][0]["message"] = message
        del made["usage"]
        return 200, {}, json.dumps(made)

    with Server([answer]) as server:
        trajectory, _ = play(server)
    assert [t.text for t in trajectory.turns] == SCRIPT


def test_settings_that_do_not_go_with_it_are_named():
    policy = {"weights": "w", "backend": "openai"}
    refused("policy.remote.url and remote.model", build_config, SegmentConfig, {"policy": policy})
    policy["remote"] = {"url": "http://h/v1", "model": "m"}
    for cls in (SegmentConfig, EvalConfig):
        said = {"policy": policy, "sampling": {"top_k": 5, "stop_ids": (3,)}}
        problems = refused("2 problems", build_config, cls, said)
        assert "sampling.top_k is not in the API" in problems and "sampling.stop_ids" in problems
    untrained = {"policy": policy, "bound": {"row": "untrained"}}
    refused("bound.row is untrained, but nobody knows which", build_config, EvalConfig, untrained)
    refused("policy.backend must be engine, got openai", build_config, TrainConfig, {"policy": policy})
    assert build_config(EvalConfig, {"policy": policy}).slowest_answer_s > 120 + 6 * 120


def test_an_evaluation_says_where_it_was_served_and_no_checksum_but_what_is_claimed(tmp_path):
    policy = {"weights": str(small.weights()), "backend": "openai", "remote": {"url": "http://h/v1", "model": "m"}}
    made = build_config(EvalConfig, {"policy": policy})
    settings = evaluate.evaluation_resume_fingerprint(made, {"row": "policy"})
    claimed = {"claimed_sha256": weights_checksum(str(small.weights()))}
    assert settings["served"] == {"url": "http://h/v1", "model": "m"} | claimed and "weights_sha256" not in settings
    copy_policy_files(small.weights(), tmp_path)  # without weights nothing is claimed
    bare = dataclasses.replace(made, policy=dataclasses.replace(made.policy, weights=str(tmp_path)))
    assert "claimed_sha256" not in evaluate.evaluation_resume_fingerprint(bare, {})["served"]
    ours = dataclasses.replace(made, policy=dataclasses.replace(made.policy, backend="engine"))
    assert evaluate.evaluation_resume_fingerprint(ours, {})["weights_sha256"] and settings["pixel_limits"]
