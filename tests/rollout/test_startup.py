"""What the commands look at before they load anything; the messages of whole commands are in test_bad_input.py."""

import dataclasses
import pathlib
import shutil
import types

import jax
import pytest

import evaluate
import train
from configs import eval_quickstart, quickstart
from rsagent_jax import collect
from rsagent_jax.config.build import build_config, template
from rsagent_jax.config.schema import (
    BatchConfig,
    CollectConfig,
    EvalConfig,
    OptimConfig,
    PolicyConfig,
    SamplingConfig,
    SegmenterConfig,
    SftConfig,
    TrainConfig,
)
from rsagent_jax.rollout import startup
from rsagent_jax.train import startup as train_startup
from sam_bridge import hub
from tests.refusals import refused


def test_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=70 << 20))
    startup.check_disk(tmp_path)
    refused(r"0\.07 GiB of free space, and 0\.08 are needed", startup.check_disk, tmp_path, more=20 << 20)


def test_a_warm_up_that_is_longer_than_the_epochs(monkeypatch):
    monkeypatch.setattr(train_startup, "open_records", lambda directory: range(100))
    config = dataclasses.replace(
        SftConfig(trajectories="set", trajectories_per_step=10), optim=OptimConfig(warmup_steps=21)
    )
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
    startup.check_weights(str(weights))
    file = weights / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused("model.safetensors is not a readable safetensors file", startup.check_weights, str(weights))


def collecting():
    config = template(CollectConfig)
    config.processor = "assets/tiny-base"
    config.agent.prompt, config.agent.typical_turn = "brief", 48
    own = config.teacher.own
    own.sampling.context, own.sampling.max_new_tokens, own.sampling.slots, own.sampling.patches = 896, 64, 8, 64
    return config


@pytest.mark.parametrize(
    ("main", "cls", "config", "root", "weights"),
    [
        (train.main, TrainConfig, quickstart.get_config(), "grpo.data", "policy.weights"),
        (evaluate.main, EvalConfig, eval_quickstart.get_config(), "data", "policy.weights"),
        (collect.main, CollectConfig, collecting(), "data", "teacher.own.weights"),
    ],
    ids=("train", "evaluate", "collect"),
)
def test_what_is_wrong_is_found_before_weights_are_downloaded(main, cls, config, root, weights, tmp_path, monkeypatch):
    """An empty root is no current folder, and of the hub only the small files have been asked for by then."""
    asked = []

    def download(name, patterns):
        asked.extend(patterns)
        return pathlib.Path("assets/tiny-base").resolve()

    monkeypatch.setattr(hub, "download", download)
    with config.unlocked():
        config.update_from_flattened_dict({f"{root}.root": "", weights: f"org/{cls.__name__}"})
        if cls is TrainConfig:
            config.stages = ("grpo",)
    says = f"{root}.root is not given: --config.{root}.root=DIR, the folder of "
    refused(says, main, build_config(cls, config.to_dict()), workdir=str(tmp_path))
    assert "config.json" in asked and "*.safetensors" not in asked


def test_a_stage_without_trajectories_names_the_field(tmp_path):
    refused("sft.trajectories is not given", train_startup._check_trajectories, SftConfig())


def test_a_replay_of_nothing_says_what_writes_it(tmp_path):
    config = build_config(TrainConfig, quickstart.get_config().to_dict())
    refused("none holds no stored step: .*grpo.dump_every", train_startup.replay_config, config, tmp_path, "none")


def test_addresses_that_nobody_asks_are_told(capsys):
    startup.check_segmenter(SegmenterConfig(addresses=("gpu-box:50051",)))
    assert capsys.readouterr().out == "segmenter.mode is spawn: gpu-box:50051 of segmenter.addresses is not asked\n"
