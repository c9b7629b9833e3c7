"""Which checkpoint a name means."""

import json

import pytest

from rsagent_jax.models.qwen25_vl.load import pin_step
from rsagent_jax.models.qwen25_vl.steps import find_step, split_step
from rsagent_jax.runtime import processes
from tests.refusals import refused


@pytest.mark.parametrize(
    ("weights", "directory", "step"),
    [
        ("runs/x/checkpoints/grpo", "runs/x/checkpoints/grpo", "last"),
        ("runs/x/checkpoints/grpo@best", "runs/x/checkpoints/grpo", "best"),
        ("/runs/a@b/checkpoints/grpo@40", "/runs/a@b/checkpoints/grpo", "40"),
        ("runs/a@b/checkpoints/grpo", "runs/a@b/checkpoints/grpo", "last"),
        ("gs://bucket/run/checkpoints/sft@last", "gs://bucket/run/checkpoints/sft", "last"),
        ("Qwen/Qwen2.5-VL-7B-Instruct@main", "Qwen/Qwen2.5-VL-7B-Instruct@main", "last"),
        ("org/name@2024", "org/name@2024", "last"),  # a revision: there is no such directory
    ],
)
def test_a_step_is_read_off_the_name_and_a_hubs_revision_is_none(weights, directory, step):
    assert split_step(weights) == (directory, step)


def test_a_directory_of_two_words_has_steps_where_it_is_there(tmp_path, monkeypatch):
    (tmp_path / "checkpoints/grpo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert split_step("checkpoints/grpo@40") == ("checkpoints/grpo", "40")


def stage(directory, scores: dict[int, float | None]):
    for step, score in scores.items():
        folder = directory / str(step) / "metrics"
        folder.mkdir(parents=True)
        (folder / "metrics").write_text(json.dumps({"score": score}))
    return directory


def test_the_best_is_the_last_of_those_with_the_highest_score(tmp_path):
    path = stage(tmp_path / "a", {2: 0.25, 10: -0.5, 4: 0.25, 12: None})
    (path / "14").mkdir()  # of a version that wrote no scores
    assert [find_step(path, step) for step in ("best", "last", "10")] == [4, 14, 10]
    refused("there is no such checkpoint; there are 2, 4, 10, 12, 14", find_step, path, "3")
    refused("@best: none of its checkpoints .2. was validated", find_step, stage(tmp_path / "b", {2: None}), "best")
    refused("holds no finished checkpoint", find_step, tmp_path)


def test_a_name_is_pinned_to_the_step_that_the_lead_finds(tmp_path, monkeypatch):
    path = stage(tmp_path / "grpo", {2: 0.25, 4: 0.0})
    assert [pin_step(f"{path}{at}") for at in ("", "@best", "@2")] == [f"{path}@{step}" for step in (4, 2, 2)]
    refused("there is no such checkpoint", pin_step, f"{path}@3")
    assert [pin_step(name) for name in ("", "org/name@2024", f"{tmp_path}/none")] == [
        "", "org/name@2024", f"{tmp_path}/none"
    ]  # fmt: skip
    (stage(tmp_path / "hf", {2: None}) / "config.json").write_text("{}")
    assert pin_step(f"{tmp_path}/hf") == f"{tmp_path}/hf"
    assert pin_step(__file__) == __file__  # no directory: who reads it says so
    monkeypatch.setattr(processes, "exchange", lambda text: ["", ""] if not text else [f"{path}@2", text])
    assert pin_step(str(path)) == f"{path}@2"
