"""Loggers get every step's figures, those of the user's as well; W&B is a stand-in that keeps what it is told."""

import os
import sys
import types

import numpy as np
import pytest

from benchmarks.soak import board_values
from rsagent_jax.runtime.loggers import Console, TensorBoard, open_loggers
from rsagent_jax.runtime.train_log import MetricsLog
from tests.refusals import refused

MINE = """
class Mine:
    def __init__(self, workdir, config):
        self.path = workdir / "mine.txt"
        self.path.write_text(config["name"] + "\\n")

    def write(self, stage, step, values):
        with self.path.open("a") as file:
            file.write(f"{stage} {step} {values['loss']}\\n")

    def close(self):
        with self.path.open("a") as file:
            file.write("closed\\n")
"""


@pytest.fixture
def wandb(monkeypatch):
    """The calls that a stand-in for the module gets."""
    calls = []
    run = types.SimpleNamespace(
        define_metric=lambda name, step_metric=None: calls.append(("metric", name, step_metric)),
        log=lambda values: calls.append(("log", values)),
        finish=lambda: calls.append(("finish",)),
    )
    module = types.SimpleNamespace(init=lambda **how: calls.append(("init", how)) or run)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_a_class_of_ones_own_and_wandb_get_what_is_logged(tmp_path, wandb):
    (tmp_path / "my_logger.py").write_text(MINE)
    names = (f"{tmp_path}/my_logger.py:Mine", "wandb")
    log = MetricsLog(tmp_path, open_loggers(names, tmp_path, {"name": "run 1"}))
    log.write("grpo", 3, {"loss": 0.5})
    log.close()
    assert (tmp_path / "mine.txt").read_text() == "run 1\ngrpo 3 0.5\nclosed\n"
    assert wandb[0][1]["config"] == {"name": "run 1"} and wandb[0][1]["dir"] == str(tmp_path)
    assert ("metric", "grpo/*", "grpo/step") in wandb
    assert wandb[-2:] == [("log", {"grpo/loss": 0.5, "grpo/step": 3}), ("finish",)]
    open_loggers(("wandb",), tmp_path, {})  # the next start goes on with the same run
    assert len({call[1]["id"] for call in wandb if call[0] == "init"}) == 1


def test_a_logger_that_is_not_there_is_a_data_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(r"wandb cannot be imported.*pip install -e '\.\[wandb\]'", open_loggers, ("wandb",), tmp_path, {})
    refused("'tensorbord' is none of .*did you mean tensorboard", open_loggers, ("tensorbord",), tmp_path, {})
    (tmp_path / "my_logger.py").write_text("def mine(): pass")
    refused("mine", open_loggers, (f"{tmp_path}/my_logger.py:mine",), tmp_path, {})
    assert open_loggers(("console", "wandb"), tmp_path, {}, lead=False) == []


def test_the_console_has_one_line_a_step(capsys, tmp_path):
    console = Console(tmp_path, {})
    step = {"reward": 0.51234, "giou": 0.4, "turns": 2.5, "loss": -0.01, "seconds": 3.21, "l2_grads": 9.0}
    console.write("grpo", 7, step)
    console.write("sft", 2, {"loss": 1.25, "seconds": 0.5, "no_update": 1.0})
    assert capsys.readouterr().out.splitlines() == [
        "grpo step 7: reward 0.512  gIoU 0.400  turns 2.50  loss -0.0100  3.2 s",
        "sft step 2: loss 1.2500  0.5 s  no update",
    ]


def test_tensorboard_shows_every_step_once_after_a_kill(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path, [TensorBoard(tmp_path, {})])
    log.rewind("sft", -1)
    for step in range(1, 6):
        log.write("sft", step, {"loss": float(step)})
    log.image("sft/first_batch", np.zeros((2, 3, 3), np.uint8), 1)
    log.write("grpo", 1, {"loss": 0.5})
    # Killed: nothing was closed. It goes on after the checkpoint of step 3, and the clock has gone back by years.
    monkeypatch.setattr("time.time", lambda: 1e9)
    again = MetricsLog(tmp_path, [TensorBoard(tmp_path, {})])
    again.rewind("sft", 3)
    for step in (4, 5, 6):
        again.write("sft", step, {"loss": 10.0 * step})
    again.close()
    tags = board_values(tmp_path / "tensorboard/sft")
    assert tags["sft/loss"] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60)] and "sft/first_batch" in tags
    assert board_values(tmp_path / "tensorboard/grpo") == {"grpo/loss": [(1, 0.5)]}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_full_disk_under_tensorboard_is_one_data_error(tmp_path):
    board = TensorBoard(tmp_path, {})
    board.write("sft", 1, {"loss": 0.5})
    board.files["sft"]._py_recordio_writer._writer = open("/dev/full", "wb")  # noqa: SIM115 closed by its loss
    refused("tensorboard cannot be written .No space.*make room", board.write, "sft", 2, {"loss": 0.25})
