"""Validation in a run: its figures are those of evaluate.py with the weights of the step, and decide what is kept."""

import contextlib
import dataclasses
import json
import shutil
import types

import jax
import numpy as np
import PIL.Image
import pytest
from agent_fakes import DiscSegmenter, disc, make_image

import evaluate
import train
from rsagent_jax.agent.replay import replay
from rsagent_jax.config.build import build_config
from rsagent_jax.config.data import DataConfig
from rsagent_jax.config.schema import GrpoConfig, OptimConfig, PolicyConfig, SftConfig, TrainConfig
from rsagent_jax.config.validation import ValidationConfig, ValidationSet
from rsagent_jax.data import trajectories
from rsagent_jax.models.qwen25_vl.fingerprint import params_checksum
from rsagent_jax.models.qwen25_vl.load import load_policy
from rsagent_jax.rollout.driver import Driver
from rsagent_jax.rollout.policy import TextPolicy
from rsagent_jax.runtime import preemption, processes
from rsagent_jax.runtime.processes import Share
from rsagent_jax.runtime.train_log import MetricsLog
from rsagent_jax.train import validation
from rsagent_jax.train.validation import Validator
from rsagent_jax.types import Batch
from sam_bridge.types import About
from tests import mesh_worker
from tests.refusals import refused
from tests.rollout import small

N = 5


class TokenDriver(Driver):
    """A random policy calls no tools: its first turn clicks where its tokens say, its second one finishes."""

    def _add(self, run, completion):
        super()._add(run, completion)
        place = int(np.sum(completion.tokens * np.arange(1, len(completion.tokens) + 1)))
        return small.finish(1) if run.state.turns else small.click(place % 56, place // 56 % 56)


class Discs(DiscSegmenter):
    about = About("discs", "discs of one size")


class Stopped(Exception):
    """What stands for a kill."""


class StoppingLog(MetricsLog):
    """Stops when step 2 has been validated, but neither logged nor saved."""

    def write(self, stage, step, values):
        if step == 2:
            raise Stopped
        super().write(stage, step, values)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """`mine`: discs of 20 pixels in the middle of pictures of 56."""
    root = tmp_path_factory.mktemp("val")
    for i in range(N):
        PIL.Image.fromarray(make_image(56, 56, seed=40 + i)).save(root / f"{i}.png")
        PIL.Image.fromarray(disc(56, 56, 28, 28, 20).astype(np.uint8) * 255).save(root / f"m{i}.png")
    rows = [{"id": f"v{i}", "image": f"{i}.png", "mask": f"m{i}.png", "query": f"disc {i}"} for i in range(N)]
    (root / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def config(root, compiled):
    """Two steps of GRPO that move the tokens a lot, validated after each of them."""
    few_programs = dict(context=256, slots=4, lanes=1, prefill=16)
    base = small.train_config("none", 2, 1, OptimConfig(lr=3e-2), 2, sampling=few_programs, dump_every=1)
    base = dataclasses.replace(
        base,
        grpo=dataclasses.replace(base.grpo, kl=0.0, mask_overlong=False),
        agent=dataclasses.replace(base.agent, announce_last=False),
    )
    mine = ValidationSet(name="mine", data=DataConfig(root=str(root), dataset="folder", split="mine"))
    return dataclasses.replace(base, validation=ValidationConfig(sets=(mine,), every=1, keep=2), cache_dir=compiled)


@pytest.fixture(scope="module", autouse=True)
def plays():
    """How often a set is played; train.py and evaluate.py play with TokenDriver."""
    played = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (train, evaluate):
            patch.setattr(module, "Driver", TokenDriver)
            patch.setattr(module, "open_segmenter", lambda _: contextlib.nullcontext(Discs()))
        patch.setattr(evaluate, "check_evaluate", lambda *_: None)
        patch.setattr(train, "open_samples", lambda _: [small.sample(i, 56, 56) for i in range(5)])
        patch.setattr(train, "tqdm", lambda steps, **_: steps)
        play = validation.play_samples
        patch.setattr(validation, "play_samples", lambda *args, **how: played.append(args[-1]) or play(*args, **how))
        yield played


def go(stage, config, workdir, log_class=MetricsLog, **more) -> dict[int, dict]:
    """Runs the stage; what it logged, by step."""
    workdir.mkdir(exist_ok=True)
    with contextlib.closing(log_class(workdir)) as log:
        mesh_worker.run_stage(stage, config, workdir, log, **more)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: row for row in rows}


@pytest.fixture(scope="module")
def run(config, tmp_path_factory, plays):
    """(work directory, rows by step) of a run that is killed after it has validated step 2, and goes on."""
    workdir = tmp_path_factory.mktemp("run") / "w"
    with pytest.raises(Stopped):
        go("grpo", config, workdir, StoppingLog)
    assert plays == ["mine, step 0", "mine, step 1", "mine, step 2"]
    rows = go("grpo", config, workdir)
    assert len(plays) == 3  # step 2 is trained again, to the same weights: what was validated stands
    return workdir, rows


@pytest.mark.slow
def test_a_signal_in_a_validation_keeps_the_step_and_the_next_start_validates_it(
    run, config, tmp_path, plays, monkeypatch
):
    before, logged = len(plays), lambda: [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    def stops():
        if plays[before:][-1:] == ["mine, step 1"]:
            raise preemption.Preempted("SIGTERM")

    with monkeypatch.context() as patched:
        patched.setattr(preemption, "check", stops)
        with pytest.raises(preemption.Preempted, match="SIGTERM") as stop:
            go("grpo", config, tmp_path)
    assert "grpo after step 1 is saved" in stop.value.kept
    assert [(row["step"], "val/giou" in row) for row in logged()] == [(0, True), (1, False)]
    with contextlib.closing(MetricsLog(tmp_path)) as log:
        mesh_worker.run_stage("grpo", config, tmp_path, log)
    assert plays[before:] == [f"mine, step {step}" for step in (0, 1, 1, 2)]
    assert [row["step"] for row in logged()] == [0, 1, 1, 2]
    rows = {step: {k: v for row in logged() if row["step"] == step for k, v in row.items()} for step in (0, 1, 2)}
    for step, want in run[1].items():
        same = [name for name in want if name.startswith("val/") or name in ("loss", "l2_grads", "reward", "lr")]
        assert {name: rows[step][name] for name in same} == {name: want[name] for name in same}


def parameters(weights: str) -> dict[str, np.ndarray]:
    return small.flat(small.split(load_policy(weights))[1])


@pytest.mark.slow
def test_the_figures_of_a_step_are_those_of_evaluate_with_its_checkpoint(run, config, tmp_path):
    workdir, rows = run
    assert sorted(rows) == [0, 1, 2]
    stage, lines = workdir / "checkpoints/grpo", (workdir / validation.RESULTS).read_text().splitlines()
    said = {line["step"]: line for line in map(json.loads, lines)}
    assert sorted(said) == [0, 1, 2] and len({line["checksum"] for line in said.values()}) == 3
    for step, weights in ((1, f"{stage}@1"), (2, f"{stage}@last")):
        out = tmp_path / f"eval{step}"
        evaluate.main(validation.evaluation_config(config, "mine"), workdir=str(out), weights=weights)
        results, row = json.loads((out / "results.json").read_text()), rows[step]
        for name in ("giou", "ciou", "tool_error_rate"):
            assert row[f"val/mine/{name}"] == row[f"val/{name}"] == results[name], (step, name)
        assert [row["val/mine/giou_low"], row["val/mine/giou_high"]] == results["giou_ci95"]
        assert row["val/mine/turns"] == results["mean_turns"] and row["val/mine/n"] == N
        assert row["val/mine/endings/max_context"] == results["failures"]["max_context"] / N
        assert row["val/mine/first_iou"] == results["behaviour"]["first_iou"]
        loaded = small.split(load_policy(weights))[1]
        assert params_checksum(loaded, "float32") == said[step]["checksum"]
    # weights that are stale by one step would show
    assert len({rows[step]["val/giou"] for step in (0, 1, 2)}) == 3


@pytest.mark.slow
def test_the_best_checkpoint_is_known_by_name(run):
    workdir, rows = run
    stage = workdir / "checkpoints/grpo"
    best = 1 if rows[1]["val/giou"] > rows[2]["val/giou"] else 2
    np.testing.assert_equal(parameters(f"{stage}@best"), parameters(f"{stage}@{best}"))
    assert not np.array_equal(parameters(f"{stage}@1")["decoder.embed"], parameters(f"{stage}@2")["decoder.embed"])
    refused("there is no such checkpoint; there are 1, 2", load_policy, f"{stage}@3")
    refused("is a Hugging Face directory, which has no steps", load_policy, f"{small.weights()}@best")


@pytest.mark.slow
def test_kept_trajectories_are_a_set_that_training_reads_and_replays(run):
    stored = trajectories.open_records(run[0] / "validation/grpo/000002/mine")
    header = trajectories.record_header(stored[1])
    assert len(stored) == 2 and trajectories.decode_record(stored[0], small.processor()).loss_mask.any()
    assert header["id"] == "folder/mine/v4" and replay(header["replay"]).status == header["status"]


@pytest.mark.slow
def test_times_add_up_to_the_step_and_work_is_counted(run):
    row = run[1][2]
    parts = {name.removeprefix("seconds/"): value for name, value in row.items() if name.startswith("seconds/")}
    assert sum(parts.values()) == pytest.approx(row["seconds"])
    assert {"weights", "rollout", "tool", "reward", "batch", "update", "validation", "other"} <= {*parts}
    assert row["perf/throughput"] == pytest.approx(row["perf/total_num_tokens"] / row["seconds"] / len(jax.devices()))
    assert row["length/mean"] * 4 == row["perf/total_num_tokens"] and row["entropy/drawn"] > 0
    assert row["behaviour/calls"] == 1.0 and row["best_iou_gap"] == 0.0


@pytest.mark.slow
def test_an_update_from_a_dump_is_the_one_that_was_made(run, config, tmp_path):
    workdir, rows = run
    dump = workdir / "dumps/step_000001"
    headers = [trajectories.record_header(record) for record in trajectories.open_records(dump)]
    assert [h["group"] for h in headers] == [0, 0, 1, 1] and all(h["step"] == 1 for h in headers)
    assert np.mean([h["reward"]["total"] for h in headers]) == pytest.approx(rows[1]["reward"])
    once = dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, steps=1), validation=ValidationConfig())
    row = go("grpo", once, tmp_path / "again", replay=str(dump))[1]
    for name in ("loss", "reward", "l2_grads"):
        assert row[name] == pytest.approx(rows[1][name], rel=1e-5), name
    again, then = parameters(f"{tmp_path}/again/checkpoints/grpo"), parameters(f"{workdir}/checkpoints/grpo@1")
    for name, value in then.items():
        np.testing.assert_allclose(again[name], value, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_sft_is_validated_through_an_engine_of_its_own(config, tmp_path, plays, monkeypatch):
    stored = small.store(tmp_path / "set", [small.task(0, h=56, w=56)], {"s0": (small.click(20, 30), small.finish(1))})
    sft = dataclasses.replace(config.sft, trajectories=str(stored), trajectories_per_step=1, steps=1)
    waited, wait = [], jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: waited.append(tree) or wait(tree))
    plays.clear()
    rows = go("sft", dataclasses.replace(config, sft=sft), tmp_path / "w")
    # Before the update is timed, for the tower's pass as well: what is in `batches`.
    assert any(isinstance(leaf, Batch) for leaf in jax.tree.leaves(waited, is_leaf=lambda x: isinstance(x, Batch)))
    assert plays == ["mine, step 0", "mine, step 1"] and rows[0]["val/giou"] != rows[1]["val/giou"]


############################## Without a run ##############################


def validator(workdir, scores: dict[int, float | None], **settings) -> Validator:
    """One that has found these figures at these steps."""
    config = TrainConfig(policy=PolicyConfig(weights=""), validation=ValidationConfig(**settings))
    made = Validator(config, "grpo", types.SimpleNamespace(), workdir)
    values = {step: {} if s is None else {"val/giou": s} for step, s in scores.items()}
    made.history = {step: {"settings": made.settings, "values": found} for step, found in values.items()}
    return made


@pytest.mark.parametrize(
    ("scores", "mode", "step", "ends"),
    [
        ((0.1, 0.5, 0.4, 0.3), "max", 3, True),  # two after the best
        ((0.1, 0.5, 0.4, 0.3), "max", 2, False),
        ((0.1, 0.5, 0.4, 0.6), "max", 3, False),
        ((0.5, 0.5, 0.5), "max", 2, True),  # as good is not better
        ((0.5, None, 0.4), "max", 2, False),  # one that was not measured does not count
        ((0.1, 0.5, 0.4), "min", 2, True),
    ],
)
def test_a_stage_ends_after_so_many_validations_without_a_new_best(scores, mode, step, ends, tmp_path):
    made = validator(tmp_path, dict(enumerate(scores)), early_stop=2, best_mode=mode)
    assert made.stop(step) == ends and not validator(tmp_path, dict(enumerate(scores))).stop(step)


def test_the_lead_decides_whether_a_stage_ends(tmp_path, monkeypatch):
    """Two processes; the second one had no part in the earlier start, and has no history."""
    with_history, without = (validator(tmp_path, k, early_stop=2) for k in ({0: 0.5, 1: 0.4, 2: 0.3}, {}))
    said = []
    monkeypatch.setattr(processes, "exchange", lambda text: said.append(text) or [said[0], text])
    assert [made.stop(2) for made in (with_history, without)] == [True, True]
    said.clear()
    assert [made.stop(2) for made in (without, with_history)] == [False, False]


def test_figures_of_other_settings_are_no_history(tmp_path):
    scores = {0: 0.9, 1: 0.2, 2: 0.1}
    made, other = validator(tmp_path, scores, early_stop=2), validator(tmp_path, scores, early_stop=2, greedy=False)
    assert made.settings != other.settings and made.measure != other.measure and made.stop(2)
    other.history = made.history | {3: other.history[1]}
    assert [other.score(step) for step in range(4)] == [None, None, None, 0.2] and not other.stop(3)
    turns = [validator(tmp_path, {}, keep_best="val/turns", best_mode=mode).measure for mode in ("min", "max")]
    assert len({made.measure, *turns}) == 3


def test_figures_of_another_segmenter_question_or_mask_are_others(config, root, tmp_path):
    there = shutil.copytree(root, tmp_path / "there")

    def settings(segmenter=Discs) -> str:
        (part,) = config.validation.sets
        part = dataclasses.replace(part, data=dataclasses.replace(part.data, root=str(there)))
        own = dataclasses.replace(config, validation=dataclasses.replace(config.validation, sets=(part,)))
        driver = types.SimpleNamespace(segmenter=segmenter())
        return Validator(own, "sft", driver, tmp_path).settings

    class Others(Discs):
        about = About("discs", "discs of another size")

    found = [settings(), settings(Others)]
    lines = (there / "mine.jsonl").read_text()
    (there / "mine.jsonl").write_text(lines.replace("disc 1", "disk 1"))
    found.append(settings())
    (there / "mine.jsonl").write_text(lines)
    shutil.copy(there / "0.png", there / "m0.png")
    found.append(settings())
    assert len({*found}) == 4
    shutil.copy(root / "m0.png", there / "m0.png")
    assert settings() == found[0]  # wherever it lies


def test_a_validation_that_failed_is_played_again(config, tmp_path, monkeypatch):
    """The segmenter is away the first time; the weights are the same all along, and so they are after a restart."""
    lost, found = {"val/mine/env_failed": 5.0}, {"val/mine/giou": 0.4, "val/giou": 0.4}
    driver = types.SimpleNamespace(policy=types.SimpleNamespace(load=lambda *_, **__: None), segmenter=Discs())
    plays = iter([lost, lost, found])
    monkeypatch.setattr(validation, "params_checksum", lambda *_: "c0")
    monkeypatch.setattr(Validator, "_measure", lambda *_: next(plays))
    first = Validator(config, "sft", driver, tmp_path)
    assert [first.run(dict, step) for step in (1, 2)] == [lost, lost]
    again = Validator(config, "grpo", driver, tmp_path)
    assert [again.run(dict, step) for step in (0, 1)] == [found, found]
    assert Validator(config, "grpo", driver, tmp_path).run(dict, 0) == found and not [*plays]


def test_what_an_earlier_start_validated_after_its_checkpoint_counts_no_longer(tmp_path):
    line = {"checksum": "a", "settings": validator(tmp_path, {}).settings}
    lines = [line | {"stage": s, "step": k, "values": {"val/giou": k / 10}} for s in ("sft", "grpo") for k in (0, 2, 4)]
    lines.append({"stage": "sft", "step": 1})  # somebody else's
    (tmp_path / validation.RESULTS).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"sta')
    made = validator(tmp_path, {})
    made.begin(2)
    assert sorted(made.history) == [0, 2] and sorted(made.found) == [0, 2, 4] and made.score(2) == 0.2


def test_an_overlap_is_told_by_count_and_name_and_an_empty_set_is_refused(root, tmp_path):
    (root / "some.jsonl").write_text("".join((root / "mine.jsonl").read_text().splitlines(keepends=True)[:2]))
    stored = small.store(tmp_path / "set", [small.task(0)], {"s0": (small.finish(None),)})
    folder = DataConfig(root=str(root), dataset="folder", split="some")
    mine = ValidationSet(name="mine", data=dataclasses.replace(folder, split="mine"))
    config = TrainConfig(
        policy=PolicyConfig(weights=""),
        sft=SftConfig(trajectories=str(stored)),
        grpo=GrpoConfig(data=folder),
        validation=ValidationConfig(sets=(mine,)),
    )
    (warning,) = validation.overlaps(config)
    assert "sets.mine: 2 of its 5 pictures are in grpo.data" in warning and f"{root}/0.png, {root}/1.png)" in warning
    (root / "none.jsonl").write_text("")
    empty = ValidationSet(name="none", data=dataclasses.replace(folder, split="none"))
    config = dataclasses.replace(config, validation=ValidationConfig(sets=(empty,)))
    refused("validation.sets.none: ", validation.overlaps, config)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(keep_best="val/iou"), "validation.keep_best: 'val/iou' is no figure; known are"),
        (dict(keep_best="val/his/giou"), "validation.keep_best: 'val/his/giou' names no set; there are mine"),
        (dict(keep_best="giou"), "validation.keep_best must be val/FIGURE or val/SET/FIGURE"),
        (dict(early_stop=2, keep_best=""), "validation.early_stop needs sets and keep_best"),
        (dict(early_stop=2, sets={}), "validation.early_stop needs sets and keep_best"),
        (dict(sets={"a/b": {}}), "must be a name without blanks and slashes"),
        (dict(sets={"mine": dict(data=dict(mix={"a": {}}))}), "validation.sets.mine.data.mix: samples of a mix come"),
    ],
)
def test_a_config_of_a_validation_that_cannot_be_is_refused(settings, says):
    given = {"policy": {"weights": "w"}, "validation": {"sets": {"mine": {}}} | settings}
    refused(says, build_config, TrainConfig, given)
    assert build_config(TrainConfig, given | {"validation": {"sets": {"mine": {}}, "keep_best": "val/mine/ciou"}})


def test_two_processes_share_a_set_out_and_both_get_the_figures_of_all(config, tmp_path, monkeypatch):
    scripts = {f"folder/mine/v{i}": (small.click(18 + 4 * i, 30), small.finish(1)) for i in range(N)}
    policy = TextPolicy(small.scripted(scripts), small.processor())
    driver = Driver(policy, Discs(), small.processor(), small.AGENT)

    def figures(index: int, count: int, heard: list) -> dict[str, float]:
        """Of process `index`, which is told what is `heard`; what it says itself goes into `said`."""

        def exchange(own) -> list:
            if not own:  # nothing went wrong
                return [own]
            said.append(own)
            return heard or [own]

        made = Validator(config, "grpo", driver, tmp_path / f"{index}{count}")
        made.share = Share(index, count)
        with monkeypatch.context() as patch:
            patch.setattr(processes, "exchange", exchange)
            return made._play("mine", 1)

    said: list = []
    whole, *_ = figures(0, 1, []), figures(0, 2, []), figures(1, 2, [])
    heard = said[1:]
    assert [len(rows) for rows, _ in said] == [5, 3, 2]
    assert figures(0, 2, heard) == figures(1, 2, heard) == whole and whole["n"] == N and 0 < whole["giou"] < 1
