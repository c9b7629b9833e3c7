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
from tests.test_notebooks import run_notebook

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
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=580, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def reproduce(work: pathlib.Path, *more: str) -> tuple[str, ...]:
    """The quickstart's recipe on a handful of scenes; with one of the three evaluations, for time."""
    cache = f"--config.cache_dir={work}/compiled"
    small = {
        "data": ("--train=24", "--val=2", "--test=6"),
        "collect": ("--config.limit=16", "--config.segmenter.mode=inprocess"),
        "train": ("--config=configs/debug.py", cache, *TELLS_APART),
        "eval-grpo": ("--config.sampling.slots=2", cache),
    }
    flags = [f"--config.stages.{stage}.more={arguments}" for stage, arguments in small.items()]
    flags += [f"--config.stages.{stage}=None" for stage in ("eval-base", "eval-sft")]
    config = "--config=configs/reproduce_quickstart.py"
    return ("-m", "rsagent_jax.reproduce", config, f"--workdir={work}", *flags, *more)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> pathlib.Path:
    """All stages of the quickstart, with the policy trained by configs/debug.py."""
    work = tmp_path_factory.mktemp("loop")
    (work / "varied.py").write_text(VARIED)
    run(*reproduce(work), modules=str(work))
    return work


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
    out = work / "eval-grpo"
    results = json.loads((out / "results.json").read_text())
    assert {"benchmark", "n", "giou", "ciou", "giou_ci95", "failures", "mean_turns", "settings"} <= set(results)
    predictions = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert results["n"] == len(predictions) == 17  # six scenes: about one thing, about pairs, and once about nothing
    assert {"n_acc", "t_acc", "giou_target"} <= set(results)
    assert results["giou"] == pytest.approx(sum(p["iou"] for p in predictions) / 17)
    keys = {"id", "sample_checksum", "picture", "mask", "intersection", "union", "iou", "status", "turns", "dropped"}
    assert set(predictions[0]) == keys
    assert (out / "report/index.html").stat().st_size > 10_000
    example = json.loads((out / "trajectories.jsonl").read_text().splitlines()[0])
    state = replay(example["record"])
    assert state.status == example["status"] == predictions[0]["status"]
    assert len(state.turns) == predictions[0]["turns"]


def test_the_notebook_reads_the_run(work, tmp_path, monkeypatch, capsys):
    (tmp_path / "docs/notebooks").mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/quickstart").symlink_to(work)
    monkeypatch.chdir(tmp_path / "docs/notebooks")
    (strip,) = [thing for thing in run_notebook("read_a_run", monkeypatch) if thing is not None]
    out = capsys.readouterr().out
    assert out.startswith("6 steps; ") and "'n': 17" in out and 2 <= len(strip.axes) <= 1 + out.count("->")


def test_the_recipe_leaves_a_summary_and_a_table(work):
    summary = json.loads((work / "summary.json").read_text())
    results = json.loads((work / "eval-grpo/results.json").read_text())
    assert all(summary["grpo"][key] == results[key] for key in ("giou", "ciou", "mean_turns"))
    assert summary["base"] is summary["sft"] is summary["gain_ci95"] is None and summary["seconds"] > 1
    assert (work / "report/index.html").stat().st_size > 10_000
    assert (work / "table.md").read_text().count("| synthetic scenes, test | ") == 1


def test_a_finished_run_started_again_has_nothing_to_do(work):
    before = (work / "train/metrics.jsonl").read_text()
    out = run(*reproduce(work, "--only=train"), modules=str(work))
    assert "sft: done, 4 of 4 steps; nothing to do" in out and "grpo: done, 2 of 2 steps; nothing to do" in out
    assert "nothing was trained: sft and grpo had been done before" in out
    assert (work / "train/metrics.jsonl").read_text() == before
    assert len((work / "train/config_history.jsonl").read_text().splitlines()) == 2


def read_alarms(directory: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "alarms.jsonl").read_text().splitlines()]


@pytest.mark.timeout(600)
def test_adapters_through_both_stages_then_exported(work):
    """GRPO starts from what SFT's adapters made of the policy; what is exported is the last stage's, merged."""
    command = (
        "train.py", "--config=configs/debug.py", f"--workdir={work}/lora", f"--config.sft.trajectories={work}/collect",
        f"--config.grpo.data.root={work}/data", f"--config.cache_dir={work}/compiled", "--config.policy.lora.rank=4",
        "--config.sft.optim.freeze=()", "--config.grpo.optim.freeze=()", "--config.grpo.kl=0.01",
        "--config.sft.optim.warmup_steps=0", "--config.grpo.optim.warmup_steps=0", *TELLS_APART,
        "--config.alarms.image_tokens=0.0", "--config.alarms.steps=1",  # beyond which any image is
    )  # fmt: skip
    assert "ALARM image_share, grpo step 1, in this step: images take " in run(*command, modules=str(work))
    out = run(*command, modules=str(work))
    assert "grpo: done, 2 of 2 steps" in out and "ALARM" not in out
    (alarm,) = [row for row in read_alarms(work / "lora") if row["alarm"] == "image_share"]
    assert (alarm["stage"], alarm["step"], len(alarm["examples"]["trajectories"])) == ("grpo", 1, 3)
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
