"""The whole recipe with the tiny policy: weights by their name on a hub, all directories in a bucket, both on loopback.

It is killed once in every stage while that works, and started again by the same command.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from rsagent_jax.models.qwen25_vl.load import weights_checksum
from rsagent_jax.runtime import command, paths
from tests.loopback_bucket import LoopbackBucket
from tests.loopback_hub import serve_hub
from tests.test_whole_loop import VARIED

ROOT = pathlib.Path(__file__).parents[1]
RECIPE = """
from configs import reproduce_quickstart
from rsagent_jax.config.build import template

SHORT = ("--config.agent.max_turns=2", "--config.segmenter.mode=inprocess")
POLICY = ("--config.cache_dir={compiled}", *SHORT)
ENGINE = "context=384 max_new_tokens=32 slots=8".split()
TRAIN = (
    "policy.lora.rank=2 sft.optim.freeze=() grpo.optim.freeze=() "
    "sft.steps=3 sft.checkpoint_every=1 sft.optim.warmup_steps=1 sft.trajectories_per_step=2 sft.batch.tokens=512 "
    "grpo.steps=2 grpo.minibatches=1 grpo.checkpoint_every=1 grpo.optim.warmup_steps=1 "
    "grpo.optim.schedule=constant grpo.prompts=2 "
    "grpo.min_spread=0 grpo.batch.tokens=512 grpo.batch.rows=1 "
    "grpo.reward.final.terms.final_iou.function=varied:by_tokens"
).split()

def get_config():
    config = reproduce_quickstart.get_config()
    stages = config.stages
    stages.data.more = ("--train=24", "--val=2", "--test=6")
    stages.collect.more = ("--config.limit=12", *SHORT)
    engine = (f"--config.grpo.sampling.{{text}}" for text in ENGINE)
    stages.train.more = (*(f"--config.{{text}}" for text in TRAIN), *engine, *POLICY)
    stages["eval-sft"] = None
    for row in ("base", "grpo"):
        stages[f"eval-{{row}}"].more = (*(f"--config.sampling.{{text}}" for text in ENGINE), *POLICY)
    return config
"""
# A stage, and what is in the bucket once it works: no more requests are answered then, and it is killed.
KILLS = {
    "data": "data/images/",
    "collect": "collect/attempts/00000-of-00001.jsonl/part-00000002",
    "train: SFT": "train/checkpoints/sft/1/commit_success.txt",
    "train: GRPO": "train/checkpoints/grpo/1/commit_success.txt",
    **{f"eval-{row}": f"eval-{row}/shards/00000-of-00001.jsonl/part-00000002" for row in ("base", "grpo")},
}
CLOCK = ("second", "tokens_per_s", "rollout/", "perf/", "compiles")  # metrics of time, and of what time decides


@pytest.fixture
def environment(tmp_path, monkeypatch) -> Iterator[LoopbackBucket]:
    """Of the children as well: a hub with the tiny base, a bucket, quick compilation."""
    base = {file.name: file.read_bytes() for file in (ROOT / "assets/tiny-base").iterdir()}
    server = LoopbackBucket()
    with serve_hub(files={"org/tiny": base}) as hub:
        values = server.environment | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub")}
        values |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
        values["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        yield server
    server.stop()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_recipe_killed_in_every_stage_gives_the_table_of_one_that_was_left_alone(environment, tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE.format(compiled=tmp_path / "compiled"))
    (tmp_path / "varied.py").write_text(VARIED)

    def start(workdir: str) -> subprocess.Popen:
        argv = ["-m", "rsagent_jax.reproduce", f"--config={tmp_path}/recipe.py", f"--workdir={workdir}"]
        streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        argv.append("--config.weights=org/tiny")
        return subprocess.Popen([sys.executable, *argv], cwd=ROOT, start_new_session=True, **streams)

    def finish(process: subprocess.Popen) -> str:
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said[-4000:]
        return said

    alone = start(f"{tmp_path}/run")
    try:
        for name, begun in KILLS.items():
            environment.storage.halt = f"run/{begun}"
            process, until = start("gs://bucket/run"), time.monotonic() + 200
            while environment.storage.left is None:
                assert process.poll() is None and time.monotonic() < until, (name, process.communicate()[0][-4000:])
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            environment.storage.halt, environment.storage.left = "", None
            stage = name.partition(":")[0]
            assert not environment.names(f"run/{stage}/done.json"), f"{name} was over before it was killed"
        finish(alone)
    finally:
        alone.kill()
    said = finish(start("gs://bucket/run"))
    assert said.count(": done\n") == 4 and "goes on: " in said  # in the last stage, which was killed as well
    there = paths.open_path("gs://bucket/run")
    assert_same_figures(tmp_path / "run", there)
    assert len(paths.read_lines(there / "train/config_history.jsonl").splitlines()) == 3  # its starts
    export = f"--checkpoint={there}/train/checkpoints/grpo", "--out=gs://bucket/hf"
    assert command.run_command("rsagent_jax.export", export) == 0 and weights_checksum("gs://bucket/hf")


def assert_same_figures(here: pathlib.Path, there: pathlib.Path) -> None:
    def read(path: pathlib.Path) -> Any:
        return json.loads(paths.read_bytes(path))

    def lines(path: pathlib.Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in paths.read_lines(path).splitlines()]

    assert lines(here / "collect/trajectories.jsonl") == lines(there / "collect/trajectories.jsonl")
    logs = [lines(workdir / "train/metrics.jsonl") for workdir in (here, there)]
    assert [f"{row['stage']} {row['step']}" for row in logs[1]] == ["sft 1", "sft 2", "sft 3", "grpo 1", "grpo 2"]
    timeless = [[{k: v for k, v in row.items() if not any(c in k for c in CLOCK)} for row in log] for log in logs]
    assert timeless[0] == timeless[1]
    for row in ("base", "grpo"):
        files = [lines(workdir / f"eval-{row}/predictions.jsonl") for workdir in (here, there)]
        a, b = ([{k: v for k, v in line.items() if k != "picture"} for line in file] for file in files)
        assert a == b and len(a) > 4
    tables = [read(workdir / "summary.json")["rows"] for workdir in (here, there)]
    assert [{**row, "command": ""} for row in tables[0]] == [{**row, "command": ""} for row in tables[1]]
    heads = [paths.read_bytes(workdir / "table.md").decode().partition("| python")[0] for workdir in (here, there)]
    assert heads[0] == heads[1] and len(paths.read_bytes(there / "report/index.html")) > 10_000
