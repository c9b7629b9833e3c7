"""An exported policy behind transformers' own server, a real OpenAI-compatible endpoint: as a remote teacher, and in
place of our engine, whose trajectory it has to give.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

pytest.importorskip("torch")

from agent_fakes import DiscSegmenter, make_image

from rsagent_jax import export
from rsagent_jax.api import Agent
from rsagent_jax.collecting import filter
from rsagent_jax.collecting.endpoint import Remote
from rsagent_jax.config.build import build_config, load_config_file
from rsagent_jax.config.schema import RemoteConfig, SegmentConfig, TeacherConfig
from rsagent_jax.rollout.endpoint import Endpoint
from rsagent_jax.runtime.listening import free_port
from tests.refusals import refused
from tests.test_collect import CONFIG, collect, dataclasses, lines, samples  # noqa: F401 - a fixture

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """URL of a running server, which is the model's name as well as the directory of its weights, and its log."""
    folder = tmp_path_factory.mktemp("served")
    directory = folder / "model"
    export.export(str(ROOT / "assets/tiny-base"), directory, "float32")
    port = free_port()
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    log = folder / "server.log"
    command = [sys.executable, "-m", "tests.serve_worker", str(directory), str(port)]
    with log.open("w") as file:
        options = dict(cwd=ROOT, stdout=file, stderr=file, env={**os.environ, "PYTHONPATH": path})
        server = subprocess.Popen(command, **options)
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()[-3000:]
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                if urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200:
                    break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", str(directory), log
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_a_teachers_trajectories_come_from_a_real_server(served, tmp_path, samples):  # noqa: F811
    url, model, log = served
    remote = RemoteConfig(url=url, model=model, max_tokens=12, temperature=1.0, retries=1, timeout_s=300.0)
    config = dataclasses.replace(CONFIG, teacher=TeacherConfig(remote=remote))
    collector, _ = collect(tmp_path / "w", samples[:3], make=Remote, config=config)
    assert collector.failures.counts == {}, (collector.failures.examples, log.read_text()[-3000:])
    (journal,) = (tmp_path / "w" / filter.ATTEMPTS).glob("*.jsonl")
    rows = lines(journal)[1:]
    # The base has never seen a tool: three malformed turns in a row end a trajectory.
    assert [row["status"] for row in rows] == ["invalid"] * 3 and {row["turns"] for row in rows} == {3}
    usage = Endpoint.shared(remote).told()
    assert usage["requests"] >= 9 and usage["tokens_out"] > 0 and usage["tokens_in"] > 100 * usage["requests"]


def agent(directory: str, url: str = "", **remote) -> Agent:
    """Ours, or with a url the served one."""
    config = load_config_file("configs/segment.py")
    if url:
        config.policy.backend = "openai"
        config.policy.remote.update({"url": url, "model": directory, "timeout_s": 300.0, "retries": 1} | remote)
    config = build_config(SegmentConfig, config)
    return Agent.load(directory, segmenter=DiscSegmenter(), config=config)


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_the_served_policy_plays_the_trajectory_of_our_engine(served):
    """Greedy, so turn by turn the same text: the ids before it are the same, held against the server's own count."""
    url, directory, log = served
    questions = [(make_image(112, 112, seed=seed), "the red circle") for seed in range(2)]
    with agent(directory) as ours, agent(directory, url) as theirs:
        wanted, got = ours.segment_many(questions), theirs.segment_many(questions)
        drawn = theirs.segment(*questions[0], temperature=1.0, max_turns=1)
    for a, b in zip(wanted, got, strict=True):
        assert [t.text for t in b.trajectory.turns] == [t.text for t in a.trajectory.turns], log.read_text()[-3000:]
        assert b.trajectory.status == a.trajectory.status and not b.failure
        np.testing.assert_array_equal(b.trajectory.tokens, a.trajectory.tokens)
    assert drawn.trajectory.turns[0].text != wanted[0].trajectory.turns[0].text
    refused("does not serve 'another' .*pinned.*; see policy.remote", agent, directory, url, model="another")


def test_the_exports_settings_are_what_the_server_goes_by(served):
    _, directory, _ = served
    generation = json.loads((pathlib.Path(directory) / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [895], "do_sample": True, "top_k": 0}
