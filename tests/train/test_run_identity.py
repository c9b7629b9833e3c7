"""What may differ between two starts in one work directory, and what is refused by name before anything is written."""

import contextlib
import dataclasses
import fnmatch
import json
import operator
import pathlib
import shutil
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train
from rsagent_jax.config.data import MixPart
from rsagent_jax.config.reward import DEFAULT_REWARD
from rsagent_jax.config.schema import DataConfig, GrpoConfig, PolicyConfig, SftConfig, TrainConfig
from rsagent_jax.runtime.journal import flatten_settings
from rsagent_jax.train import run_identity
from rsagent_jax.types import DataError
from sam_bridge.types import About
from tests.refusals import refused

BASE = TrainConfig(policy=PolicyConfig(weights="a"), sft=SftConfig(steps=8), grpo=GrpoConfig(steps=6))
COSINE = dataclasses.replace(BASE.sft.optim, schedule="cosine")


def with_field(config, name: str, value):
    head, _, rest = name.partition(".")
    value = with_field(getattr(config, head), rest, value) if rest else value
    return dataclasses.replace(config, **{head: value})


def plain(config) -> dict:
    return run_identity._plain(config)


def fields(old, new, *saved) -> list[str]:
    return [d.field for d in run_identity.refused(plain(old), plain(new), saved)]


NAMES = sorted(name for name in flatten_settings(plain(BASE)) if "[" not in name and name != "stages")


def is_free(name):
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in run_identity.FREE)


def other(value):
    """Another value of the same type; numbers are smaller, since a longer run would be allowed."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value - 1
    return value + "x" if isinstance(value, str) else (*value, "x")


@given(st.sampled_from(NAMES), st.sampled_from([(), ("sft",), ("sft", "grpo"), ("grpo",)]))
def test_a_changed_field_is_refused_by_name_unless_it_is_free_or_had_no_part_yet(name, saved):
    if name in ("sft.epochs", "grpo.reward", "grpo.data.mix"):
        return  # steps count; items of a group have names of their own
    new = with_field(BASE, name, other(operator.attrgetter(name)(BASE)))
    head = name.split(".")[0]
    # GRPO starts from what SFT left, so its checkpoints are SFT's as well.
    later = {"grpo": "grpo", "agent": "grpo", "segmenter": "grpo"}.get(head)
    counts = bool(saved) and (later is None or later in saved) and not is_free(name)
    assert fields(BASE, new, *saved) == ([name] if counts else [])
    assert fields(new, new, *saved) == []


def test_every_free_field_exists():
    mixed = with_field(BASE, "grpo.data.mix", (MixPart(name="a", data=DataConfig(root="x")),))
    names = [*flatten_settings(plain(mixed))]
    assert not [pattern for pattern in run_identity.FREE if not fnmatch.filter(names, pattern)]
    assert set(run_identity.LENGTHS) <= set(names)


@pytest.mark.parametrize(
    ("changes", "saved", "why"),
    [
        ({"grpo.steps": 7}, ("sft", "grpo"), None),
        ({"grpo.steps": 5}, ("sft", "grpo"), "it can only grow"),
        ({"sft.steps": 10}, ("sft",), None),
        ({"sft.steps": 10}, ("sft", "grpo"), "grpo was trained from what sft had become"),
        ({"sft.steps": 10}, ("grpo",), "grpo was trained from what sft had become"),  # sft's were removed
        ({"sft.steps": 0}, ("sft",), "it can only grow"),  # to as many as the epochs give
        ({"sft.epochs": 3.0}, ("sft", "grpo"), None),  # steps are given
        ({"grpo.epochs": 2}, ("grpo",), ""),
        ({"stages": ("grpo",)}, ("sft",), "sft has checkpoints"),
        ({"stages": ("sft",)}, ("sft",), None),
        ({"stages": ("sft",)}, ("sft", "grpo"), "grpo has checkpoints"),
    ],
)
def test_lengths_and_stages(changes, saved, why):
    new = BASE
    for name, value in changes.items():
        new = with_field(new, name, value)
    found = run_identity.refused(plain(BASE), plain(new), saved)
    assert [(d.field, d.why) for d in found] == ([] if why is None else [(next(iter(changes)), why)])


def test_a_length_that_a_schedule_follows_from_is_refused():
    old = with_field(BASE, "sft.optim", COSINE)
    (found,) = run_identity.refused(plain(old), plain(with_field(old, "sft.steps", 9)), ("sft",))
    assert str(found) == "sft.steps: 8 there, 9 now (the cosine schedule follows from it)"
    epochs = with_field(BASE, "sft.steps", 0)
    assert fields(epochs, with_field(epochs, "sft.epochs", 3.0), "sft") == []
    assert fields(epochs, with_field(epochs, "sft.epochs", 1.0), "sft") == ["sft.epochs"]


def test_terms_of_the_reward_are_compared_by_name_whatever_their_order():
    final, process, form = DEFAULT_REWARD
    assert fields(BASE, with_field(BASE, "grpo.reward", (form, process, final)), "grpo") == []
    fewer = with_field(BASE, "grpo.reward", (final, dataclasses.replace(process, terms=process.terms[:-1]), form))
    term = "grpo.reward.process.terms.rsagent_jax.rewards:overshoot"
    for old, new in ((BASE, fewer), (fewer, BASE)):
        assert fields(old, new, "grpo") == [
            f"{term}.{field}" for field in ("arguments", "function", "name", "scope", "weight")
        ]
    twice = with_field(BASE, "grpo.reward", (dataclasses.replace(final, terms=final.terms * 2), process, form))
    assert len(fields(BASE, twice, "grpo")) == 5
    heavier = with_field(BASE, "grpo.reward", (dataclasses.replace(final, weight=2.0), process, form))
    assert fields(BASE, heavier, "grpo") == ["grpo.reward.final.weight"]


def test_sets_of_a_mix_may_move_and_not_change():
    def mixed(**data):
        return with_field(BASE, "grpo.data.mix", (MixPart(name="a", data=DataConfig(**data)),))

    assert fields(mixed(root="x"), mixed(root="y", exclude_root="z"), "grpo") == []
    assert fields(mixed(), mixed(split="val"), "grpo") == ["grpo.data.mix.a.data.split"]
    assert "grpo.data.mix.a.weight" in fields(mixed(), BASE, "grpo")


def test_fields_that_came_or_went_with_a_version_count_only_where_they_do_something():
    old = plain(BASE)
    del old["grpo"]["min_spread"], old["policy"]["lora"]
    old["grpo"]["forgotten"] = 3
    assert run_identity.refused(old, plain(BASE), ("grpo",)) == []
    (found,) = run_identity.refused(old, plain(with_field(BASE, "grpo.min_spread", 0.5)), ("grpo",))
    assert str(found) == "grpo.min_spread: 0.0 there, 0.5 now"


# --- On disk ---


@pytest.fixture
def workdir(tmp_path):
    """A run that was started once and has checkpoints of both stages."""
    run_identity.record_start(tmp_path, BASE, INPUTS)
    for stage, steps in (("sft", (4, 8)), ("grpo", (2, 4))):
        for name in (*map(str, steps), "policy", "12.orbax-checkpoint-tmp"):
            (tmp_path / "checkpoints" / stage / name).mkdir(parents=True)
    return tmp_path


INPUTS = {"policy.weights": "w0", "sft.trajectories": "t0", "grpo.data": "d0", "segmenter": "sam2: large"}


def contents(workdir: pathlib.Path) -> dict:
    return {p.name: p.read_bytes() for p in workdir.iterdir() if p.is_file()}


def test_a_refusal_names_field_old_and_new_value_and_touches_nothing(workdir):
    before = contents(workdir)
    with pytest.raises(DataError) as error:
        run_identity.check_config(workdir, with_field(with_field(BASE, "seed", 3), "grpo.optim.lr", 1e-5))
    for words in ("seed: 0 there, 3 now", "grpo.optim.lr: 1e-06 there, 1e-05 now", "--workdir", "grpo after update 4"):
        assert words in str(error.value)
    assert f"--config.policy.weights={workdir}/checkpoints/grpo" in str(error.value)
    for name in INPUTS:
        with pytest.raises(DataError, match=rf'{name}: "{INPUTS[name]}" there, "other" now \(other content'):
            run_identity.check_same_inputs(workdir, INPUTS | {name: "other"})
    assert contents(workdir) == before
    run_identity.check_config(workdir, BASE)
    run_identity.check_same_inputs(workdir, INPUTS)
    shutil.rmtree(workdir / "checkpoints/grpo")  # nothing was played with it yet
    run_identity.check_same_inputs(workdir, INPUTS | {"segmenter": "sam2: tiny"})


def test_the_segmenter_of_a_start_is_what_answers_it(tmp_path, monkeypatch):
    answers = types.SimpleNamespace(about=About("sam2", "sam2 large 0123"))
    monkeypatch.setattr(train, "open_segmenter", lambda config: contextlib.nullcontext(answers))
    monkeypatch.setattr(train, "open_samples", lambda config, where: types.SimpleNamespace(ids=["a"]))
    config = dataclasses.replace(BASE, stages=("grpo",), policy=PolicyConfig(weights="assets/tiny-base"))
    assert train.check_inputs(config, tmp_path, None, "")["segmenter"] == "sam2: sam2 large 0123"


def test_every_start_is_a_line_and_config_json_is_the_last(workdir, capsys):
    more = with_field(with_field(BASE, "grpo.steps", 9), "segmenter.workers", 4)
    run_identity.check_config(workdir, more)
    with (workdir / run_identity.HISTORY).open("a") as file:
        file.write('{"time": "2026-')  # killed while it wrote
    run_identity.check_config(workdir, more)
    run_identity.record_start(workdir, more, INPUTS)
    assert "half written" in capsys.readouterr().out
    first, second = map(json.loads, (workdir / run_identity.HISTORY).read_text().splitlines())
    assert (first["saved"], second["saved"]) == ({}, {"sft": 8, "grpo": 4})
    assert first["config"] == plain(BASE) and second["config"] == plain(more) and "jax" in second["versions"]
    assert json.loads((workdir / "config.json").read_text()) == plain(more)
    refused(r"grpo\.steps: 9 there, 6 now \(it can only grow\)", run_identity.check_config, workdir, BASE)


def test_before_the_first_checkpoint_anything_may_change(tmp_path):
    run_identity.record_start(tmp_path, BASE, INPUTS)
    (tmp_path / "checkpoints" / "sft" / "2.orbax-checkpoint-tmp").mkdir(parents=True)
    run_identity.check_config(tmp_path, with_field(BASE, "seed", 3))
    run_identity.check_same_inputs(tmp_path, dict.fromkeys(INPUTS, "other"))


def test_checkpoints_without_their_history_are_refused(workdir):
    (workdir / run_identity.HISTORY).unlink()
    refused(r"not what made it.*--workdir", run_identity.check_config, workdir, BASE)


@pytest.mark.parametrize("line", ["{\n", "[]\n", "{}\n"])
def test_a_damaged_line_of_the_history_is_left_out(workdir, line, capsys):
    with (workdir / run_identity.HISTORY).open("a") as file:
        file.write(line)
    refused("seed: 0 there, 1 now", run_identity.check_config, workdir, with_field(BASE, "seed", 1))
    refused("policy.weights: ", run_identity.check_same_inputs, workdir, INPUTS | {"policy.weights": "other"})
    run_identity.check_config(workdir, BASE)
    run_identity.record_start(workdir, BASE, INPUTS)
    assert f"{run_identity.HISTORY}, line 2: damaged" in capsys.readouterr().out
    assert len((workdir / run_identity.HISTORY).read_text().splitlines()) == 2


def test_a_start_whose_line_is_whole_but_for_its_newline_counts(workdir):
    history = workdir / run_identity.HISTORY
    history.write_bytes(history.read_bytes().removesuffix(b"\n"))
    run_identity.check_config(workdir, BASE)
    refused("seed: 0 there, 1 now", run_identity.check_config, workdir, with_field(BASE, "seed", 1))


def test_weights_are_known_by_content_and_not_by_place(tmp_path):
    def weights(name, middle=b"0", extra=""):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(10**5) + middle + bytes(10**5))
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "README.md").write_text(extra)
        return run_identity.weights_fingerprint(str(tmp_path / name))

    assert weights("a") == weights("b", extra="moved") != weights("c", middle=b"1")


def test_weights_of_a_stage_are_those_of_its_newest_checkpoint(tmp_path):
    for step in ("2", "10"):
        (tmp_path / step / "params").mkdir(parents=True)
        (tmp_path / step / "params" / "data").write_text(f"step {step}")
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text("{}")
    before = run_identity.weights_fingerprint(str(tmp_path))
    (tmp_path / "2" / "params" / "data").write_text("gone")
    assert run_identity.weights_fingerprint(str(tmp_path)) == before
    (tmp_path / "12" / "params").mkdir(parents=True)
    (tmp_path / "12" / "params" / "data").write_text("trained on")
    assert run_identity.weights_fingerprint(str(tmp_path)) != before
