"""What the commands look at before they load anything; the messages of whole commands are in test_bad_input.py."""

import dataclasses
import shutil
import types

import jax

from rsagent_jax.config.schema import (
    BatchConfig,
    OptimConfig,
    PolicyConfig,
    SamplingConfig,
    SegmenterConfig,
    SftConfig,
    TrainConfig,
)
from rsagent_jax.rollout import startup
from rsagent_jax.train import startup as train_startup
from tests.refusals import refused


def test_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=70 << 20))
    startup.check_disk(tmp_path)
    refused(r"0\.07 GiB of free space, and 0\.08 are needed", startup.check_disk, tmp_path, more=20 << 20)


def test_a_warm_up_that_is_longer_than_the_epochs(monkeypatch):
    monkeypatch.setattr(train_startup, "open_records", lambda directory: range(100))
    config = dataclasses.replace(SftConfig(trajectories_per_step=10), optim=OptimConfig(warmup_steps=21))
    says = r"sft\.optim\.warmup_steps must be at most the stage's 20 updates, got 21"
    refused(says, train_startup._check_trajectories, config)


def test_grpo_is_refused_where_several_processes_would_play_the_same_rows(tmp_path, monkeypatch):
    config = TrainConfig(policy=PolicyConfig(weights="assets/tiny-base", remat="none"), stages=("grpo",))
    grpo = dataclasses.replace(config.grpo, batch=BatchConfig(rows=1), sampling=SamplingConfig(slots=1))
    config = dataclasses.replace(config, grpo=grpo)
    monkeypatch.setattr(jax, "process_count", lambda: 2)  # and both hold the mesh's one group of rows
    refused("spreads a tensor group over several processes", train_startup.check_train, config, tmp_path)


def test_a_back_end_of_ones_own_is_called_without_arguments(tmp_path):
    (tmp_path / "mine.py").write_text("def make(size): return None\n")
    config = SegmenterConfig(mode="inprocess", backend=f"{tmp_path}/mine.py:make")
    refused(r"mine.py:make' takes \(size\), but is called with \(\)", startup.check_segmenter, config)


def test_weights_are_looked_at_without_reading_them(tmp_path):
    weights = shutil.copytree("assets/tiny-base", tmp_path / "w")
    assert startup.check_weights(str(weights))[0].text.hidden_size == 128
    file = weights / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused("model.safetensors is not a readable safetensors file", startup.check_weights, str(weights))
