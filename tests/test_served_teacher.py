"""The remote teacher against transformers' own server with the tiny base behind it: a real OpenAI-compatible endpoint
that reads our messages, pictures included. Needs `pip install "transformers[serving]"`; skipped without.
"""

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip("torch")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from rsagent_jax.collecting import filter
from rsagent_jax.collecting.endpoint import Endpoint, Remote
from rsagent_jax.config.schema import RemoteConfig, TeacherConfig
from tests.test_collect import CONFIG, collect, dataclasses, lines, samples  # noqa: F401 - a fixture

ROOT = pathlib.Path(__file__).parents[1]
# Qwen2.5-VL's layout of a conversation, as its own chat_template.json has it.
TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content -%}
{%- if part.type in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}
{%- endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


@pytest.fixture
def served(tmp_path):
    """URL and model name of a running server."""
    directory = tmp_path / "model"
    shutil.copytree(ROOT / "assets/tiny-base", directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    log = (tmp_path / "server.log").open("w")
    command = [sys.executable, "-m", "tests.serve_worker", str(directory), str(port)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": path})
    try:
        for _ in range(600):
            assert server.poll() is None, (tmp_path / "server.log").read_text()[-3000:]
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                if urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200:
                    break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", str(directory)
    finally:
        server.terminate()
        server.wait(30)
        log.close()


@pytest.mark.timeout(900)
def test_trajectories_come_from_a_real_server(served, tmp_path, samples):  # noqa: F811
    url, model = served
    remote = RemoteConfig(url=url, model=model, max_tokens=12, temperature=1.0, retries=1, timeout_s=300.0)
    config = dataclasses.replace(CONFIG, teacher=TeacherConfig(remote=remote))
    collector, _ = collect(tmp_path / "w", samples[:3], make=Remote, config=config)
    log = (tmp_path / "server.log").read_text()[-3000:]
    assert collector.failures.counts == {}, (collector.failures.examples, log)
    (journal,) = (tmp_path / "w" / filter.ATTEMPTS).iterdir()
    rows = lines(journal)[1:]
    # The base has never seen a tool: three malformed turns in a row end a trajectory.
    assert [row["status"] for row in rows] == ["invalid"] * 3 and {row["turns"] for row in rows} == {3}
    usage = Endpoint.shared(remote).told()
    assert usage["requests"] >= 9 and usage["tokens_out"] > 0 and usage["tokens_in"] > 100 * usage["requests"]
