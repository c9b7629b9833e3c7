"""Whatever a user gets wrong is one clear message on stderr, a non-zero exit and no traceback.

Starting a command costs seconds of imports, so most cases run in this process, through the command line's own function;
a fresh process runs some, to be sure of the rest.
"""

import pathlib
import signal
import socket
import subprocess
import sys
import time

import PIL.Image
import pytest

from rsagent_jax.runtime import command
from rsagent_jax.tiny import synthetic

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def run(capfd, monkeypatch):
    """run("train.py", "--flag") or run("-m", "module", "--flag") -> what `fresh` gives, in this process."""
    monkeypatch.setattr(command, "use_compilation_cache", lambda *_: None)

    def call(*argv: object) -> subprocess.CompletedProcess:
        name, *flags = (str(word) for word in argv if word != "-m")
        capfd.readouterr()
        status = command.run_command(f"{ROOT}/{name}" if name.endswith(".py") else name, flags)
        return subprocess.CompletedProcess(argv, status, *capfd.readouterr())

    return call


def fresh(*argv: object) -> subprocess.CompletedProcess:
    """The same in a process of its own."""
    return subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, timeout=240)


def said(done: subprocess.CompletedProcess, *needles: object) -> str:
    """Checks that the command refused with one message that holds all `needles`; returns the message."""
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr and "Traceback" not in done.stdout, done.stderr
    starts = [i for i, line in enumerate(done.stderr.splitlines()) if line.startswith("error: ")]
    assert len(starts) == 1, done.stderr
    message = "\n".join(done.stderr.splitlines()[starts[0] :])
    for needle in needles:
        assert str(needle) in message, message
    return message


@pytest.fixture
def config(tmp_path):
    """Writes a config file; returns its path."""

    def write(text: str) -> pathlib.Path:
        (tmp_path / "mine.py").write_text(text)
        return tmp_path / "mine.py"

    return write


def collect(data, workdir, *more) -> tuple:
    head = ("-m", "rsagent_jax.collect", "--config=configs/collect_quickstart.py", f"--workdir={workdir}")
    return (*head, f"--config.data.root={data}", "--config.limit=0", "--config.segmenter.mode=inprocess", *more)


def train(workdir, *more) -> tuple:
    return ("train.py", "--config=configs/quickstart.py", f"--workdir={workdir}", *more)


def grpo(data, workdir, *more) -> tuple:
    small = ("--config.grpo.sampling.slots=1", "--config.grpo.prompts=1", "--config.segmenter.mode=inprocess")
    return train(workdir, "--config.stages=('grpo',)", f"--config.grpo.data.root={data}", *small, *more)


# ------------------------------------------------------------------------------------------ config files and flags

HEAD = (
    "from rsagent_jax.config.build import template; from rsagent_jax.config.schema import TrainConfig\n"
    "def get_config():\n    c = template(TrainConfig)\n"
)


def test_unknown_fields_of_the_file_and_of_the_command_line_are_listed_together(config, tmp_path):
    file = config(HEAD + "    c.sft.epoch = 3.0\n    c.grpo.reward.final.wieght = 2.0\n    return c\n")
    argv = (f"--config={file}", "--config.grpo.stpes=3", "--config.policy.weights=x", f"--workdir={tmp_path}")
    message = said(
        fresh("train.py", *argv, "--config.lr=1e-3"),
        "--config.grpo.stpes; did you mean --config.grpo.steps?",
        "sft.epoch; did you mean sft.epochs?",
        "grpo.reward.final.wieght; did you mean grpo.reward.final.weight?",
        "optim.lr?",
        "config has 4 problems",
    )
    assert "policy.weights" not in message  # given on the command line, so not missing


def test_a_config_file_that_does_not_exist(run, tmp_path):
    said(run(*train(tmp_path), "--config=configs/quikstart.py"), "configs/quikstart.py", "mean configs/quickstart.py?")
    said(run("evaluate.py", f"--workdir={tmp_path}"), "--config=configs/X.py is required")
    said(run("evaluate.py"), "--config=configs/X.py is required")


@pytest.mark.parametrize(
    ("text", "needles"),
    [
        (HEAD + "    c.sft.epochs = = 3\n", ("mine.py, line 4", "SyntaxError")),
        (HEAD + "    c.sft.epochs = tow\n    return c\n", ("mine.py, line 4", "NameError", "'tow'")),
        ("import nunpy\n", ("mine.py, line 1", "ModuleNotFoundError", "nunpy")),
        (HEAD, ("mine.py", "must return a ConfigDict, got NoneType")),
        ("config = 1\n", ("mine.py", "has no function get_config()")),
    ],
    ids=["syntax", "name", "import", "return", "get_config"],
)
def test_an_error_in_the_config_file_names_its_line(run, config, tmp_path, text, needles):
    message = said(run("train.py", f"--config={config(text)}", f"--workdir={tmp_path}"), *needles)
    assert "\n" not in message


def test_unknown_flags_and_stray_arguments(run, tmp_path):
    said(run(*train(tmp_path, "--workdri=x")), "workdri", "workdir")
    said(run(*train(tmp_path, "config.grpo.steps=3")), "unexpected argument 'config.grpo.steps=3'", "--config.")


# -------------------------------------------------------------------------------------------------------- data


def test_a_broken_picture(run, copied, tmp_path):
    image = copied / synthetic.IMAGES / "COCO_train2014_000010000001.jpg"  # the first of val
    image.write_bytes(image.read_bytes()[:900])
    done = run(*collect(copied, tmp_path / "w", "--config.data.split=val"))
    assert done.returncode == 0, done.stderr
    for needle in ("kept ", "not collected", "unreadable sample", f"{image} is not a readable picture"):
        assert needle in done.stdout, done.stdout


# ----------------------------------------------------------------------------------------------------- weights


def evaluate(data, workdir, weights) -> tuple:
    config = ("--config=configs/eval_quickstart.py", f"--config.data.root={data}", "--config.sampling.slots=1")
    return ("evaluate.py", *config, f"--workdir={workdir}", f"--weights={weights}")


def test_missing_weights(run, dataset, tmp_path):
    said(run(*evaluate(dataset, tmp_path / "w", tmp_path / "none")), tmp_path / "none", "does not exist")


# ------------------------------------------------------------------------------------- segmenters and functions


def test_a_checkpoint_that_does_not_exist(run, dataset, tmp_path):
    sam2 = ("--config.segmenter.backend=sam2", f"--config.segmenter.checkpoint={tmp_path / 'none.pt'}")
    for mode in ("spawn", "inprocess"):  # torch is not loaded to learn that a file is missing
        done = run(*collect(dataset, tmp_path / "w", *sam2, f"--config.segmenter.mode={mode}"))
        said(done, tmp_path / "none.pt", "does not exist")


def test_a_side_car_that_is_not_there(run, dataset, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    connect = ("--config.segmenter.mode=connect", "--config.segmenter.wait_s=1.0")
    start = time.monotonic()
    done = run(*collect(dataset, tmp_path / "w", *connect, f"--config.segmenter.addresses=('{address}',)"))
    message = said(done, address, "gave up after")
    assert float(message.rpartition("gave up after ")[2].split()[0]) < 2.0  # wait_s, and one try that was under way
    assert time.monotonic() - start < 60


def test_a_teacher_that_does_not_exist(run, dataset, tmp_path):
    wrong = "--config.teacher.function=rsagent_jax.collecting.oracle:Oracel"
    said(run(*collect(dataset, tmp_path / "w", wrong)), "'Oracel'", "'Oracle'")
    teacher = tmp_path / "mine.py"
    teacher.write_text("class Mine:\n    def __init__(self, config): pass\n")
    done = run(*collect(dataset, tmp_path / "w", f"--config.teacher.function={teacher}:Mine"))
    said(done, f"{teacher}:Mine", "takes (config)", "called with (config, rng)")


def test_a_reward_that_does_not_exist(run, dataset, tmp_path):
    wrong = "--config.grpo.reward.final.terms.final_iou.function=rsagent_jax.rewards:final_iuo"
    said(run(*grpo(dataset, tmp_path / "w", wrong)), "'final_iuo'", "'final_iou'")
    # before SFT, too, whose trajectories are not even looked for
    both = (f"--config.sft.trajectories={tmp_path / 'none'}", f"--config.grpo.data.root={dataset}")
    said(run(*train(tmp_path / "w", *both, wrong)), "'final_iuo'")
    assert not (tmp_path / "w" / "config.json").exists()


def test_what_is_left_to_a_slice_that_is_not_named(run, tmp_path):
    left = run(*train(tmp_path / "w", "--config.grpo.batch.rows=0", "--config.policy.remat="))
    said(left, "policy.remat, grpo.batch.rows: left to the slice's preset, and no slice is named")


@pytest.mark.parametrize(("name", "patches"), [("batch", 800), ("sampling", 100)])
def test_patches_that_are_no_whole_number_of_windows(run, dataset, tmp_path, name, patches):
    done = run(*grpo(dataset, tmp_path / "w", f"--config.grpo.{name}.patches={patches}"))
    said(done, f"grpo.{name}", "patches must be a multiple of the vision tower's window of 64 patches", patches)


# ------------------------------------------------------------------------------------------ segment, interruption


def test_segment(run, tmp_path):
    photo = tmp_path / "photo.jpg"
    PIL.Image.effect_noise((64, 64), 90).save(photo)
    segment = ("-m", "rsagent_jax.segment")
    out = f"--out={tmp_path / 'out'}"
    said(fresh(*segment, tmp_path / "none.jpg", "it", out), tmp_path / "none.jpg", "does not exist")
    said(run(*segment, photo, "  ", out), "the query is empty")
    said(run(*segment, photo, out), "QUERY is missing")
    said(run(*segment, photo, "the", "circle", out), "unexpected argument 'circle'")
    said(run(*segment, photo, "it"), "--out=DIR is required")
    said(run(*segment, photo, "it", f"--out={photo}"), photo, "cannot be written to")
    said(run(*segment, photo, "it", out, f"--weights={tmp_path / 'none'}"), tmp_path / "none", "does not exist")
    said(run(*segment, photo, "it", out, "--config=configs/segment.py:big"), "'big' is unknown")
    photo.write_bytes(photo.read_bytes()[:-300])
    said(run(*segment, photo, "it", out), photo, "truncated")
    photo.write_text("no picture")
    said(run(*segment, photo, "it", out), photo, "not a readable picture")


def test_an_interrupted_training_says_how_to_go_on(dataset, tmp_path):
    argv = [sys.executable, *map(str, grpo(dataset, tmp_path / "w"))]
    process = subprocess.Popen(
        argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
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
