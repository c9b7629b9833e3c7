"""Interrupted and resumed training equals uninterrupted training, and what does not fit is refused in one message."""

import contextlib
import dataclasses
import functools
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from agent_fakes import DiscSegmenter

import train
from rsagent_jax.config.schema import LoraConfig, MeshConfig, OptimConfig
from rsagent_jax.models.qwen25_vl import convert, lora
from rsagent_jax.models.qwen25_vl.config import load_config
from rsagent_jax.models.qwen25_vl.load import load_policy, policy_directory
from rsagent_jax.models.qwen25_vl.steps import find_step
from rsagent_jax.rollout.driver import Driver
from rsagent_jax.runtime import checksums, preemption, sharding
from rsagent_jax.runtime.train_log import MetricsLog
from rsagent_jax.train.checkpoint import NO_ADAPTERS, Checkpoints
from rsagent_jax.train.state import cast_frozen, create_state, make_optimizer, partition_params
from tests import mesh_worker
from tests.refusals import refused
from tests.rollout import small

pytestmark = pytest.mark.slow

STEPS = 4
MISFIT = "does not fit the model and optimiser of this config"
OPTIM = OptimConfig(lr=3e-3, warmup_steps=1, schedule="cosine", weight_decay=0.01)
TIMES = ("seconds", "rollout_seconds", "tokens_per_s", "tool_seconds", "perf/throughput", "compiles")
PARTS = ("seconds/", "rollout/")


class Stopped(Exception):
    """What stands for Ctrl-C, or for a machine that was taken away."""


class StoppingLog(MetricsLog):
    """Stops the training when step 3 has been logged but not saved: the newest checkpoint is that of step 2."""

    def write(self, stage, step, values):
        super().write(stage, step, values)
        if step == 3:
            raise Stopped


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Five short trajectories, so that an epoch ends inside the run and the next one is shuffled anew."""
    directory = tmp_path_factory.mktemp("set")
    tasks = [small.task(i, h=56, w=56) for i in range(5)]
    scripts = {f"s{i}": (small.click(20 + i, 30), small.finish(1)) for i in range(5)}
    return small.store(directory, tasks, scripts)


@pytest.fixture
def go(stored, compiled, monkeypatch):
    """go(stage, workdir, log_class, …) trains the stage; returns its parameters by name."""
    monkeypatch.setattr(train, "open_samples", lambda _: [small.sample(i, 56, 56) for i in range(5)])
    monkeypatch.setattr(train, "open_segmenter", lambda _: contextlib.nullcontext(DiscSegmenter()))
    monkeypatch.setattr(train, "tqdm", lambda steps, **_: steps)
    base = small.train_config(stored, 2, 1, OPTIM, STEPS, sampling=dict(context=400), epochs=2)
    base = dataclasses.replace(base, sft=dataclasses.replace(base.sft, trajectories_per_step=3))

    def run(stage, workdir, log_class=MetricsLog, lora=NO_ADAPTERS, weights=None, rows=1, **optim):
        part = dict(optim=dataclasses.replace(OPTIM, **optim), checkpoint_every=2)
        part["batch"] = dataclasses.replace(base.sft.batch, rows=rows)
        config = dataclasses.replace(
            base,
            policy=dataclasses.replace(base.policy, lora=lora),
            **{name: dataclasses.replace(getattr(base, name), **part) for name in ("sft", "grpo")},
        )
        workdir.mkdir(exist_ok=True)
        with contextlib.closing(log_class(workdir)) as log:
            return small.flat(mesh_worker.run_stage(stage, config, workdir, log, weights))

    return run


def lines(workdir) -> list[dict]:
    """Without times, and without how the engine's work fell together: that depends on when a tool's thread is done."""
    out = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES and not k.startswith(PARTS)} for line in out]


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("stage", "part"),
    [
        ("sft", {}),
        ("grpo", {}),
        ("grpo", dict(lora=LoraConfig(rank=4), offload=True)),
        ("sft", dict(freeze=("vision", "merger"), offload=True)),
    ],
)
def test_run_4_equals_run_2_and_resume_2(stage, part, go, tmp_path):
    go = functools.partial(go, **part)
    whole = go(stage, tmp_path / "whole")
    start = {k: np.asarray(v) for k, v in convert.flat_params(small.model()).items()}
    assert max(np.abs(whole[k] - start[k]).max() for k in whole) > 1e-3  # it did learn something
    with pytest.raises(Stopped):
        go(stage, tmp_path / "parts", StoppingLog)
    assert [line["step"] for line in lines(tmp_path / "parts")] == [1, 2, 3]
    last = str(STEPS * (2 if stage == "grpo" else 1))
    # The base comes from the checkpoint as well: other weights than those the stage began with change nothing.
    other = {k: v + 0.5 for k, v in start.items()} if (has_base := bool({*part} & {"lora", "freeze"})) else None
    resumed = go(stage, tmp_path / "parts", weights=other)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")  # every number but the times
    got, want = (state_in(tmp_path / run / "checkpoints" / stage / last) for run in ("parts", "whole"))
    assert all(np.array_equal(got[name], value) for name, value in want.items()) and got.keys() == want.keys()
    assert [(line["step"], line["stage"]) for line in lines(tmp_path / "whole")] == [(s, stage) for s in (1, 2, 3, 4)]

    # the stage's directory is a policy of its own, and a third start has nothing left to do
    loaded = convert.flat_params(load_policy(str(tmp_path / "parts" / "checkpoints" / stage)))
    for name in whole:
        np.testing.assert_array_equal(loaded[name], resumed[name], err_msg=name)
    assert (tmp_path / "parts" / "checkpoints" / stage / "base").exists() == has_base
    if stage == "sft":
        assert_same(go(stage, tmp_path / "parts"), whole)
        assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


@pytest.mark.parametrize(("stage", "turns"), [("sft", 0), ("grpo", 5)])
def test_a_signal_in_a_step_loses_nothing_of_it(stage, turns, go, tmp_path, monkeypatch):
    """The third step is stopped, in GRPO after some turns of its rollout; the last planned checkpoint is that of the
    second, and is not made twice."""
    logged, drawn, add = [], [], Driver._add

    class Counting(MetricsLog):
        def write(self, stage, step, values):
            super().write(stage, step, values)
            logged.append(step)

    def stops():
        if logged[-1:] == [2] and len(drawn) >= turns:
            raise preemption.Preempted("SIGTERM")

    whole = go(stage, tmp_path / "whole", eps=1e-4)  # else Adam magnifies the rounding of contexts read anew
    with monkeypatch.context() as patched:
        patched.setattr(preemption, "check", stops)
        patched.setattr(Driver, "_add", lambda *a: drawn.extend([1] * (logged[-1:] == [2])) or add(*a))
        with pytest.raises(preemption.Preempted) as stop:
            go(stage, tmp_path / "parts", Counting, eps=1e-4)
    kept, saved = tmp_path / "parts/checkpoints" / stage / "under_way", 2 * (2 if stage == "grpo" else 1)
    assert find_step(kept.parent, "last") == saved and f"{stage} after step 2 is saved" in stop.value.kept
    assert kept.exists() == ("trajectories (" in stop.value.kept) == (stage == "grpo")
    assert_same(go(stage, tmp_path / "parts", eps=1e-4), whole)
    assert not kept.exists()
    for got, want in zip(lines(tmp_path / "parts"), lines(tmp_path / "whole"), strict=True):
        exactly = stage == "sft" or got["step"] < 3
        near = {
            k: v if exactly or isinstance(v, str) else pytest.approx(v, rel=1e-4, abs=1e-5) for k, v in want.items()
        }
        assert got == near


def test_a_signal_in_a_save_lets_it_end_and_no_other_is_made(go, tmp_path, monkeypatch):
    saved, save = [], Checkpoints.save

    def signalled(checkpoints, state, *rest):
        saved.append(int(state.step))
        save(checkpoints, state, *rest)

    def stops():
        if saved:
            raise preemption.Preempted("SIGTERM")

    with monkeypatch.context() as patched:
        patched.setattr(preemption, "check", stops)
        patched.setattr(Checkpoints, "save", signalled)
        with pytest.raises(preemption.Preempted) as stop:
            go("sft", tmp_path / "parts")
    directory = tmp_path / "parts/checkpoints/sft"
    assert saved == [2] and stop.value.kept == ": sft after step 2 is saved"
    assert find_step(directory) == 2 and checksums.find_damage(directory / "2") == ""
    # `batch.rows` may be another at each start: the gradient is a sum over all of the step's rows.
    assert_same(go("sft", tmp_path / "parts", rows=2), go("sft", tmp_path / "whole"))


def test_a_work_directory_that_is_removed_under_the_run_is_one_error(go, tmp_path):
    class RemovingLog(MetricsLog):
        def write(self, stage, step, values):
            if step == 2:
                shutil.rmtree(tmp_path / "w")
            super().write(stage, step, values)

    refused(f"metrics.jsonl cannot be written: there is no {tmp_path}/w, or", go, "sft", tmp_path / "w", RemovingLog)
    assert not (tmp_path / "w").exists()


def test_a_step_in_which_nothing_teaches_moves_no_bit_of_the_state_and_is_counted(go, tmp_path, monkeypatch):
    """Steps 3 and 4, with weight decay, KL and the momentum of steps 1 and 2; the checkpoints are those of 2 and 4."""
    teaches = iter([True, True, False, False])
    monkeypatch.setattr(train.GrpoSource, "_all_agree", lambda *_: (next(teaches), {}))
    go("grpo", tmp_path)
    rows = lines(tmp_path)
    assert [row["no_update"] for row in rows] == [0.0, 0.0, 1.0, 1.0]
    _, schedule = make_optimizer(OPTIM, 2 * STEPS)
    assert [row.get("lr") for row in rows] == [pytest.approx(float(schedule(n))) for n in (1, 3)] + [None, None]
    assert [row["l2_updates"] > 0 for row in rows] == [True, True, False, False] and all("reward" in r for r in rows)
    before, after = (state_in(tmp_path / "checkpoints" / "grpo" / step) for step in ("4", "8"))
    assert before.pop("optimizer.leaf_00000") == 4 and after.pop("optimizer.leaf_00000") == 8  # state.step
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name], err_msg=name)


def closing(directory, *adapters, weights=None):
    """Its checkpoints, which wait and close at the end."""
    return contextlib.closing(Checkpoints(directory, weights or small.weights(), *adapters))


def state_in(directory) -> dict[str, np.ndarray]:
    with ocp.StandardCheckpointer() as reader:
        parts = {part: reader.restore(directory / part) for part in ("params", "optimizer")}
    return {f"{part}.{name}": np.asarray(value) for part, tree in parts.items() for name, value in tree.items()}


def state_of(hidden: int = 32, layers: int = 2, optim: OptimConfig = OPTIM):
    path = small.weights(hidden, layers)
    graphdef, params = small.split(convert.load_model(path, load_config(path)))
    _, params, _ = partition_params(graphdef, params, LoraConfig(), optim.freeze)
    tx, _ = make_optimizer(optim, 4)
    return jax.jit(lambda p: create_state(p, tx))(params)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A stage's directory with a checkpoint of step 0."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints" / "sft"
    with closing(directory) as checkpoints:
        checkpoints.save(state_of(), {"position": 5, "dropped": 1})
    return directory


def test_a_stage_that_has_stopped_early_is_not_trained_on_beneath_a_later_one(go, tmp_path, capsys):
    with closing(tmp_path / "checkpoints" / "sft") as checkpoints:
        checkpoints.save(dataclasses.replace(state_of(), step=jnp.int32(2)), {"position": 5, "dropped": 0})
    start = {k: np.asarray(v) for k, v in convert.flat_params(small.model()).items()}
    (tmp_path / "checkpoints" / "grpo" / "6").mkdir(parents=True)
    assert_same(go("sft", tmp_path), start)
    assert f"sft: done, 2 of {STEPS} steps; nothing to do" in capsys.readouterr().out
    assert not (tmp_path / "metrics.jsonl").exists()


def test_scores_of_another_measure_are_none(tmp_path):
    """giou, larger is better, and then turns, fewer are better: -2.3 is the best of these, and 0.6 is no turn."""
    state, directory = state_of(), tmp_path / "sft"
    for measure, start in (("giou", {1: 0.6}), ("turns", {2: -2.9, 3: -2.3, 4: -2.5, 5: None})):
        with contextlib.closing(Checkpoints(directory, small.weights(), measure=measure)) as checkpoints:
            for step, score in start.items():
                checkpoints.save(dataclasses.replace(state, step=jnp.int32(step)), {}, score=score)
    assert {int(path.name) for path in directory.iterdir() if path.name.isdigit()} == {3, 4, 5}
    assert find_step(directory, "best") == 3


def test_the_best_one_stays_beside_the_newest_two_over_a_restart(tmp_path, caplog):
    state, directory = state_of(), tmp_path / "sft"
    for start in ({1: 0.2, 2: 0.9, 3: None, 4: 0.1}, {5: 0.9, 6: None, 7: 0.3}):  # as good: the later one
        with closing(directory) as checkpoints:
            for step, score in start.items():
                checkpoints.save(dataclasses.replace(state, step=jnp.int32(step)), {}, score=score)
        kept = {int(path.name) for path in directory.iterdir() if path.name.isdigit()}
        assert kept == ({2, 3, 4} if 1 in start else {5, 6, 7})
    assert find_step(directory, "best") == 5 and not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("hidden", "layers", "optim"),
    [(48, 2, OPTIM), (32, 3, OPTIM), (32, 2, dataclasses.replace(OPTIM, freeze=("vision",)))],
)
def test_a_checkpoint_of_another_model_or_optimiser_is_one_data_error(saved, tmp_path, hidden, layers, optim):
    directory = shutil.copytree(saved, tmp_path / "sft")
    with closing(directory, weights=small.weights(hidden, layers)) as checkpoints:
        said = refused(MISFIT, checkpoints.restore, state_of(hidden, layers, optim))
    assert str(directory) in said and "--workdir" in said


ADAPTERS = LoraConfig(rank=4, alpha=8.0)


def state_and_base(adapters: LoraConfig):
    """A state of adapters that do something, and the base under them in bfloat16."""
    graphdef, params = small.split(small.model())
    _, declared, base = partition_params(graphdef, params, adapters, ())
    values = jax.tree.map(lambda v: v + 0.01, lora.init(declared, jax.random.key(1)))
    tx, _ = make_optimizer(OPTIM, 4)
    return jax.jit(lambda p: create_state(p, tx))(values), cast_frozen(base, "bfloat16")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A checkpoint of adapters, in a directory where a first try left another base and no finished step."""
    directory = tmp_path_factory.mktemp("adapted") / "checkpoints" / "grpo"
    state, base = state_and_base(ADAPTERS)
    with ocp.StandardCheckpointer() as writer:
        writer.save(directory / "base", {"decoder.embed": jnp.zeros(3)})
    with closing(directory, ADAPTERS) as checkpoints:
        checkpoints.save(state, {}, base)
    return directory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", [None, MeshConfig()])
def test_a_policy_with_adapters_is_loaded_merged(adapted, mesh, dtype):
    state, base = state_and_base(ADAPTERS)
    want = {name: value.astype(np.float32) for name, value in small.flat(base).items()}
    values = small.flat(state.params)
    for linear in {name.rsplit(".", 1)[0] for name in values}:
        want[f"{linear}.kernel"] += 2.0 * values[f"{linear}.lora_a"] @ values[f"{linear}.lora_b"]
    loaded = convert.flat_params(load_policy(str(adapted), None if mesh is None else sharding.make_mesh(mesh), dtype))
    assert loaded.keys() == want.keys()
    for name, value in loaded.items():
        assert value.dtype == dtype
        rounding = 2**-8 * np.abs(want[name]) if dtype == "bfloat16" else 0  # once: half a step of the sum
        assert (np.abs(np.asarray(value, np.float32) - want[name]) <= rounding + 1e-6).all(), name


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (LoraConfig(rank=4, alpha=9.0), r"has adapters with \{'rank': 4, 'alpha': 8.0\}, this config has .*9.0"),
        (LoraConfig(rank=2, alpha=8.0), MISFIT),
        (LoraConfig(rank=4, alpha=8.0, targets=("q",)), MISFIT),
        (NO_ADAPTERS, MISFIT),
    ],
)
def test_a_checkpoint_of_other_adapters_is_one_data_error(adapted, saved, other, match):
    with closing(adapted, other) as checkpoints:
        refused(match, checkpoints.restore, state_and_base(other)[0] if other.rank else state_of())
    with closing(saved, ADAPTERS) as checkpoints:  # nor do adapters continue a run that trained everything
        refused(MISFIT, checkpoints.restore, state_and_base(ADAPTERS)[0])


def test_a_lost_base_is_a_data_error(adapted, tmp_path):
    directory = shutil.copytree(adapted, tmp_path / "grpo")
    shutil.rmtree(directory / "base")
    refused("is not of the model in .*base/ is gone", load_policy, str(directory))
    with closing(directory, ADAPTERS) as checkpoints:
        refused("base is damaged .it is gone.*put it back", checkpoints.restore_base, state_and_base(ADAPTERS)[1])


def test_a_checkpoint_whose_parts_do_not_belong_together_is_a_data_error(saved, tmp_path):
    directory = shutil.copytree(saved, tmp_path / "sft")
    shutil.copyfile(small.weights(48, 2) / "config.json", directory / "policy" / "config.json")
    refused("is not of the model in", load_policy, str(directory))
    shutil.rmtree(directory / "0" / "params")
    with closing(directory) as checkpoints:  # which puts the right policy files back
        refused(r"none of its checkpoints can be used: 0 \(params/", checkpoints.restore, state_of())
    refused(r"sft/0 is damaged \(params/.* is missing.*there is no other one", load_policy, str(directory))


def test_policy_files_travel_with_the_checkpoints(saved):
    assert policy_directory(str(saved)) == saved / "policy"
    assert policy_directory(str(small.weights())) == small.weights()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert (saved / "policy" / name).read_bytes() == (small.weights() / name).read_bytes()
    assert not list((saved / "policy").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("given", "holds", "found"),
    [
        ("7b", ("7b/config.json", "7b/model.safetensors"), "7b"),
        ("7b", ("7b/config.json", "7b/model.safetensors.index.json"), "7b"),
        # neighbours and contents of whatever name change nothing
        ("7b", ("7b/config.json", "7b/model.safetensors", "policy/config.json"), "7b"),
        ("7b", ("7b/config.json", "7b/model.safetensors", "7b/checkpoints/a.txt"), "7b"),
        ("7b", ("7b/config.json", "7b/model.safetensors", "7b/checkpoints/sft/policy/config.json"), "7b"),
        ("7b", ("7b/config.json", "7b/model.safetensors", "7b/policy/config.json"), "7b"),
        ("policy", ("policy/config.json", "policy/model.safetensors"), "policy"),
        ("7", ("7/config.json", "7/model.safetensors", "policy/config.json"), "7"),
        # no weights needed
        ("tokens", ("tokens/config.json", "tokens/tokenizer.json", "policy/config.json"), "tokens"),
        ("sft", ("sft/policy/config.json", "sft/7/params/a"), "sft/policy"),
        ("sft", ("sft/policy/config.json", "sft/7/params/a", "policy/config.json"), "sft/policy"),
        # what was meant is said
        ("x", ("x/checkpoints/sft/policy/config.json", "x/config.json"), r"holds no weights itself; give .*/<stage>"),
        ("sft/7", ("sft/policy/config.json", "sft/7/params/a"), "holds no weights itself; give .*/sft"),
        ("a.json", ("a.json",), "is a file; give a Hugging Face directory"),
        ("nowhere", ("a.json",), "does not exist; give a Hugging Face directory"),
    ],
)
def test_what_a_folder_holds_says_what_it_is_and_not_its_neighbours(given, holds, found, tmp_path):
    for name in holds:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    if (tmp_path / found).exists():
        assert policy_directory(str(tmp_path / given)) == tmp_path / found
    else:
        refused(found, policy_directory, str(tmp_path / given))


def test_other_weights_leave_no_file_of_the_former_ones_in_a_stage(saved, tmp_path):
    directory = shutil.copytree(saved, tmp_path / "sft")
    (directory / "policy" / "processor_config.json").write_text("{}")
    Checkpoints(directory, small.weights()).close()
    assert not (directory / "policy" / "processor_config.json").exists()


def test_reading_a_checkpoint_warns_of_nothing_and_writes_nothing(saved, caplog):
    before = sorted(saved.rglob("*"))
    load_policy(str(saved))
    assert not [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert sorted(saved.rglob("*")) == before
