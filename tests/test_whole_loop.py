"""The commands of the README, one after another on a handful of scenes: every arrow, every file and key."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from rsagent_jax.agent.replay import replay
from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.models.qwen25_vl.load import load_policy

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
BASE = "assets/tiny-base"


# Four steps of SFT make a policy that nearly always fails, from which GRPO has nothing to learn: so that it has,
# samples are told apart by their tokens.
VARIED = """
def by_tokens(trajectory, sample):
    return float(trajectory.tokens.sum() % 97) / 97
"""


TELLS_APART = (
    "--config.grpo.min_spread=0", "--config.grpo.reward.final.terms.final_iou.function=varied:by_tokens",
)  # fmt: skip


def run(*command: str, modules: str = "") -> str:
    """`modules`: a directory to import from as well."""
    env = os.environ | ({"PYTHONPATH": modules} if modules else {})
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=280, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> pathlib.Path:
    """Data, trajectories, and a policy trained by configs/debug.py."""
    work = tmp_path_factory.mktemp("loop")
    run("-m", "rsagent_jax.tiny.synthetic", f"--out={work}/data", "--train=24", "--val=2", "--test=6")
    data = f"--config.data.root={work}/data"
    collect = ("-m", "rsagent_jax.collect", "--config=configs/collect_quickstart.py", f"--workdir={work}/collect", data)
    run(*collect, "--config.limit=16", "--config.segmenter.mode=inprocess")
    (work / "varied.py").write_text(VARIED)
    train(work)
    return work


def train(work: pathlib.Path) -> str:
    return run(
        "train.py", "--config=configs/debug.py", f"--workdir={work}/train", f"--config.sft.trajectories={work}/collect",
        f"--config.grpo.data.root={work}/data", f"--config.cache_dir={work}/compiled", *TELLS_APART, modules=str(work),
    )  # fmt: skip


@pytest.mark.timeout(600)
def test_training_leaves_metrics_of_both_stages_and_checkpoints(work):
    lines = [json.loads(line) for line in (work / "train/metrics.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in lines] == [("sft", i) for i in (1, 2, 3, 4)] + [("grpo", 1), ("grpo", 2)]
    assert all(r["loss"] is not None for r in lines) and not any(r.get("no_update") for r in lines)
    keys = {"reward", "reward/final", "reward/process", "reward/format", "giou", "turns", "tool_errors"}
    assert keys <= set(lines[-1])
    assert (work / "train/config.json").exists()
    assert (work / "train/checkpoints/grpo/2").exists()
    for stage in ("sft", "grpo"):
        assert "[[" in (work / f"train/first_batch_{stage}.txt").read_text()
        with Image.open(work / f"train/first_batch_{stage}.png") as strip:
            assert strip.width % (112 + 4) == 0 and strip.height == 112  # one image of the row after the other


def test_evaluation_leaves_results_predictions_and_a_report_and_a_trajectory_replays(work):
    out = work / "eval"
    run(
        "evaluate.py", "--config=configs/eval_quickstart.py", f"--workdir={out}",
        f"--weights={work}/train/checkpoints/grpo",
        f"--config.data.root={work}/data", "--config.sampling.slots=6", f"--config.cache_dir={work}/compiled",
    )  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    assert {"benchmark", "n", "giou", "ciou", "giou_ci95", "failures", "mean_turns", "settings"} <= set(results)
    predictions = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert results["n"] == len(predictions) == 7  # six scenes, one of them with a question about what is not there
    assert {"n_acc", "t_acc", "giou_target"} <= set(results)
    assert results["giou"] == pytest.approx(sum(p["iou"] for p in predictions) / 7)
    keys = {"id", "picture", "mask", "intersection", "union", "iou", "status", "turns", "dropped"}
    assert set(predictions[0]) == keys
    assert (out / "report/index.html").stat().st_size > 10_000
    example = json.loads((out / "trajectories.jsonl").read_text().splitlines()[0])
    state = replay(example["record"])
    assert state.status == example["status"] == predictions[0]["status"]
    assert len(state.turns) == predictions[0]["turns"]


def test_a_finished_run_started_again_has_nothing_to_do(work):
    before = (work / "train/metrics.jsonl").read_text()
    out = train(work)
    assert "sft: done, 4 of 4 steps; nothing to do" in out and "grpo: done, 2 of 2 steps; nothing to do" in out
    assert "nothing was trained: sft and grpo had been done before" in out
    assert (work / "train/metrics.jsonl").read_text() == before
    assert len((work / "train/config_history.jsonl").read_text().splitlines()) == 2


@pytest.mark.timeout(600)
def test_adapters_through_both_stages_then_exported(work):
    """GRPO starts from what SFT's adapters made of the policy; what is exported is the last stage's, merged."""
    command = (
        "train.py", "--config=configs/debug.py", f"--workdir={work}/lora", f"--config.sft.trajectories={work}/collect",
        f"--config.grpo.data.root={work}/data", f"--config.cache_dir={work}/compiled", "--config.policy.lora.rank=4",
        "--config.sft.optim.freeze=()", "--config.grpo.optim.freeze=()", "--config.grpo.kl=0.01",
        "--config.sft.optim.warmup_steps=0", "--config.grpo.optim.warmup_steps=0", *TELLS_APART,
    )  # fmt: skip
    run(*command, modules=str(work))
    assert "grpo: done, 2 of 2 steps" in run(*command, modules=str(work))
    lines = [json.loads(line) for line in (work / "lora/metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["stage"] == "grpo")
    assert abs(first["kl_ref"]) < 1e-6  # the reference is what the fresh adapters stand on
    sft, grpo = (convert.flat_params(load_policy(str(work / f"lora/checkpoints/{s}"))) for s in ("sft", "grpo"))
    start = convert.flat_params(load_policy(str(ROOT / BASE)))
    for name in start:
        adapted = name.startswith("decoder.layers") and name.endswith("kernel")
        assert bool(np.any(sft[name] != start[name])) == bool(np.any(grpo[name] != sft[name])) == adapted, name
    run("-m", "rsagent_jax.export", f"--checkpoint={work}/lora/checkpoints/grpo", f"--out={work}/hf", "--dtype=float32")
    for name, value in convert.flat_params(load_policy(str(work / "hf"))).items():
        np.testing.assert_array_equal(value, grpo[name], err_msg=name)
