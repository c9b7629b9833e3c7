"""Loggers get every step's figures, those of the user's as well; W&B is a stand-in that keeps what it is told."""

import sys
import types

import pytest

from rsagent_jax.runtime.loggers import Console, open_loggers
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
    refused(r"wandb cannot be imported.*pip install 'rsagent-jax\[wandb\]'", open_loggers, ("wandb",), tmp_path, {})
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
