"""Whatever a user gets wrong is one clear message on stderr, a non-zero exit and no traceback.

A fresh process runs one case, and all others this one: what tells a message from a traceback is `run_command`.
"""

import os
import pathlib
import signal
import subprocess
import sys
import time

import PIL.Image
import pytest

from rsagent_jax.runtime import command

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
HEAD = (
    "from rsagent_jax.config.build import template; from rsagent_jax.config.schema import TrainConfig\n"
    "def get_config():\n    c = template(TrainConfig)\n"
)
GRPO = (
    "train.py --config=configs/quickstart.py --workdir={tmp}/w --config.stages=('grpo',) --config.grpo.data.root={data}"
    " --config.segmenter.mode=inprocess --config.grpo.sampling.slots=1 --config.grpo.prompts=1"
)
COLLECT = (
    "rsagent_jax.collect --config=configs/collect_quickstart.py --workdir={tmp}/w --config.data.root={data}"
    " --config.segmenter.mode=inprocess"
)
TEACHER = f"{COLLECT} --config.teacher.function"
EVALUATE = (
    "evaluate.py --config=configs/eval_quickstart.py --workdir={tmp}/w --config.data.root={data}"
    " --config.sampling.slots=1"
)
MISSPELT = "--config.grpo.reward.final.terms.final_iou.function=rsagent_jax.rewards:final_iuo"
SAM2 = "--config.segmenter.backend=sam2 --config.segmenter.checkpoint={tmp}/none.pt"
WINDOW = "patches must be a multiple of the vision tower's window of 64 patches"


def environment() -> dict[str, str]:
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    return {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}


@pytest.fixture
def said(capsys, monkeypatch):
    """said(name, *argv): the message with which a command refuses."""
    monkeypatch.setattr(command, "use_compilation_cache", lambda *_: None)  # of this process, for all tests after it

    def call(name: str, *argv: object) -> str:
        assert command.run_command(name, [str(a) for a in argv]) == 2
        _, *messages = capsys.readouterr().err.split("error: ")
        (message,) = messages
        return message

    return call


def test_unknown_fields_of_the_file_and_of_the_command_line_are_listed_together(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(HEAD + "    c.sft.epoch = 3.0\n    c.grpo.reward.final.wieght = 2.0\n    return c\n")
    flags = [f"--config={file}", "--config.grpo.stpes=3", "--config.policy.weights=x", f"--workdir={tmp_path}"]
    argv = [sys.executable, "train.py", *flags, "--config.lr=1e-3"]
    done = subprocess.run(argv, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stderr
    for words in (
        "error: config has 4 problems",
        "--config.grpo.stpes; did you mean --config.grpo.steps?",
        "sft.epoch; did you mean sft.epochs?",
        "grpo.reward.final.wieght; did you mean grpo.reward.final.weight?",
        "optim.lr?",
    ):
        assert words in done.stderr
    assert "Traceback" not in done.stderr and "policy.weights" not in done.stderr  # given, so not missing


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HEAD + "    c.sft.epochs = = 3\n", ("mine.py, line 4", "SyntaxError")),
        (HEAD + "    c.sft.epochs = tow\n    return c\n", ("mine.py, line 4", "NameError", "'tow'")),
        ("import nunpy\n", ("mine.py, line 1", "ModuleNotFoundError", "nunpy")),
        (HEAD, ("mine.py", "must return a ConfigDict, got NoneType")),
        ("config = 1\n", ("mine.py", "has no function get_config()")),
    ],
    ids=["syntax", "name", "import", "return", "get_config"],
)
def test_an_error_in_the_config_file_names_its_line(said, tmp_path, text, words):
    (tmp_path / "mine.py").write_text(text)
    message = said("train.py", f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path}")
    assert all(word in message for word in words) and message.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("evaluate.py", "--config=configs/X.py is required"),
        (f"{GRPO} --config=configs/quikstart.py", "configs/quikstart.py does not exist; did you mean configs/quickst"),
        (f"{GRPO} config.grpo.steps=3", "unexpected argument 'config.grpo.steps=3'; an override starts with --config."),
        (f"{EVALUATE} --weights={{tmp}}/none", "{tmp}/none does not exist"),
        (f"{COLLECT} {SAM2}", "{tmp}/none.pt does not exist"),  # torch is not loaded to learn that a file is missing
        (f"{COLLECT} {SAM2} --config.segmenter.mode=spawn", "{tmp}/none.pt does not exist"),
        (f"{TEACHER}=rsagent_jax.collecting.oracle:Oracel", "has no 'Oracel'; did you mean 'Oracle'"),
        (f"{TEACHER}={{tmp}}/mine.py:Mine", "Mine' takes (config), but is called with (config, rng)"),
        (f"{GRPO} {MISSPELT}", "'final_iuo'; did you mean 'final_iou'"),
        (f"{GRPO} --config.grpo.batch.rows=0 --config.policy.remat=", "policy.remat, grpo.batch.rows: left to the sl"),
        (f"{GRPO} --config.grpo.batch.patches=800", f"grpo.batch.{WINDOW}, got 800"),
        (f"{GRPO} --config.grpo.sampling.patches=100", f"grpo.sampling: {WINDOW}"),
    ],
)  # fmt: skip
def test_what_a_command_cannot_work_with(said, dataset, tmp_path, line, words):
    (tmp_path / "mine.py").write_text("class Mine:\n    def __init__(self, config): pass\n")
    places = dict(tmp=tmp_path, data=dataset)
    assert words.format(**places) in said(*line.format(**places).split(" "))


def test_a_reward_that_does_not_exist_is_told_before_sft(said, dataset, tmp_path):
    """Whose trajectories are not even looked for."""
    both = (f"--config.sft.trajectories={tmp_path / 'none'}", f"--config.grpo.data.root={dataset}", MISSPELT)
    assert "'final_iuo'" in said("train.py", "--config=configs/quickstart.py", f"--workdir={tmp_path / 'w'}", *both)
    assert not (tmp_path / "w" / "config.json").exists()


def test_segment(said, tmp_path):
    photo, out, none = tmp_path / "photo.jpg", f"--out={tmp_path / 'out'}", tmp_path / "none"
    PIL.Image.effect_noise((64, 64), 90).save(photo)
    for argv, words in (
        ((none, "it", out), f"{none} does not exist"),
        ((photo, "  ", out), "the query is empty"),
        ((photo, out), "QUERY is missing"),
        ((photo, "the", "circle", out), "unexpected argument 'circle'"),
        ((photo, "it"), "--out=DIR is required"),
        ((photo, "it", f"--out={photo}"), f"{photo} cannot be written to"),
        ((photo, "it", out, f"--weights={none}"), f"{none} does not exist"),
        ((photo, "it", out, "--config=configs/segment.py:big"), "'big' is unknown"),
    ):
        assert words in said("rsagent_jax.segment", *argv)
    whole = photo.read_bytes()
    for content, words in ((whole[:-300], "truncated"), (b"no picture", "not a readable picture")):
        photo.write_bytes(content)
        message = said("rsagent_jax.segment", photo, "it", out)
        assert str(photo) in message and words in message


def test_an_interrupted_training_says_how_to_go_on(dataset, tmp_path):
    argv = [sys.executable, *GRPO.format(tmp=tmp_path, data=dataset).split(" ")]
    process = subprocess.Popen(
        argv, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # a test run that was started in the background passes on an ignored SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        while not (tmp_path / "w" / "config.json").exists() and process.poll() is None:
            time.sleep(0.1)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "stopped; run the same command again to go on from the last checkpoint"
