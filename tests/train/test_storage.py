"""What a disk may do to a run: checkpoints that are damaged, cannot be written, or should not be."""

import contextlib
import functools
import json
import os
import pathlib
import shutil
import time

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rsagent_jax.runtime import checksums
from rsagent_jax.train.checkpoint import Checkpoints
from rsagent_jax.train.reference import FILE, check_reference
from rsagent_jax.train.state import TrainState
from tests.refusals import refused

WEIGHTS = pathlib.Path("nowhere")  # whose policy files are not there to be copied
TX = optax.adam(0.1)


def state(step: int, value: float | None = None) -> TrainState:
    """48 parameters, of the step's number where no value is given."""
    rows = jnp.arange(32, dtype=jnp.float32).reshape(8, 4) / 7 + (step if value is None else value)
    params = nnx.State({"head": nnx.Param(rows), "norm": nnx.Param(jnp.full(16, float(step)))})
    return TrainState(jnp.int32(step), params, TX.init(params))


def closing(directory, **how):
    return contextlib.closing(Checkpoints(directory, WEIGHTS, **how))


def steps_in(directory) -> set[str]:
    return {path.name for path in directory.iterdir()} - {"policy"}


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def largest(folder: pathlib.Path) -> pathlib.Path:
    return max(files(folder), key=lambda path: (path.stat().st_size, str(path)))


def truncate(path: pathlib.Path, size: int | None = None) -> None:
    os.truncate(path, path.stat().st_size // 2 if size is None else size)


def flip(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def remove_half(folder: pathlib.Path) -> None:
    for path in files(folder)[::2]:
        path.unlink()


DAMAGES = {
    "an array cut in half": lambda step: truncate(largest(step / "params")),
    "an array's byte flipped": lambda step: flip(largest(step / "params/ocdbt.process_0/d")),
    "every array emptied": lambda step: [truncate(path, 0) for path in files(step / "params")],
    "an array of zeros": lambda step: (p := largest(step / "params")).write_bytes(bytes(p.stat().st_size)),
    "a moment cut in half": lambda step: truncate(largest(step / "optimizer")),
    "no index": lambda step: (step / "params/manifest.ocdbt").unlink(),
    "half an index": lambda step: truncate(step / "params/_METADATA"),
    "no optimiser": lambda step: shutil.rmtree(step / "optimizer"),
    "half of it deleted": remove_half,
    "all of it deleted": lambda step: [shutil.rmtree(p) if p.is_dir() else p.unlink() for p in step.iterdir()],
    "another position": lambda step: (step / "source/metadata").write_text('{"position": 7}'),
    "a foreign file": lambda step: (step / "params/notes.txt").write_text("mine"),
    "half its checksums": lambda step: truncate(step / checksums.MANIFEST),
    "no checksums": lambda step: (step / checksums.MANIFEST).unlink(),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 2 and 4."""
    directory = tmp_path_factory.mktemp("saved") / "sft"
    with closing(directory) as checkpoints:
        for step in (2, 4):
            checkpoints.save(state(step), {"position": step})
    return directory


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_one_before_a_damaged_checkpoint_is_gone_on_from_and_said(saved, tmp_path, damage, capsys):
    directory = shutil.copytree(saved, tmp_path / "sft")
    DAMAGES[damage](directory / "4")
    with closing(directory) as checkpoints:
        restored, source = checkpoints.restore(state(0))
        assert int(restored.step) == 2 and source == {"position": 2}
        np.testing.assert_array_equal(restored.params["head"][...], state(2).params["head"][...])
        said = capsys.readouterr().out
        warning = f"warning: {directory}: goes on without what is damaged: 4 ("
        assert said.startswith(warning) and said.count("\n") == 1
        checkpoints.save(state(4, 1.0), {"position": 4})  # the step comes again
    assert steps_in(directory) == {"2", "4", "4.damaged"}
    with closing(directory) as checkpoints:
        assert float(checkpoints.restore(state(0))[0].params["head"][0, 0]) == 1.0
    assert capsys.readouterr().out == ""


def test_a_checkpoint_that_cannot_be_read_is_as_a_damaged_one(saved, tmp_path, monkeypatch, capsys):
    directory, read = shutil.copytree(saved, tmp_path / "sft"), checksums._checksum

    def bad_sector(path):
        if path.parent == directory / "4/params/ocdbt.process_0/d":
            raise OSError(5, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(checksums, "_checksum", bad_sector)
    with closing(directory) as checkpoints:
        assert int(checkpoints.restore(state(0))[0].step) == 2
    assert "damaged: 4 (it cannot be read (Input/output error: " in capsys.readouterr().out


def test_none_that_is_whole_is_one_data_error_that_names_each_and_touches_nothing(saved, tmp_path):
    directory = shutil.copytree(saved, tmp_path / "sft")
    flip(largest(directory / "4/params/ocdbt.process_0/d"))
    (directory / "2/params/manifest.ocdbt").unlink()
    with closing(directory) as checkpoints:
        said = refused("none of its checkpoints can be used", checkpoints.restore, state(0))
    assert "has other content" in said and "2 (params/manifest.ocdbt is missing)" in said
    assert steps_in(directory) == {"2", "4"}


def test_a_score_that_cannot_be_read_is_a_damaged_checkpoint_and_not_the_end_of_every_start(saved, tmp_path, capsys):
    directory = shutil.copytree(saved, tmp_path / "sft")
    truncate(directory / "4/metrics/metrics")
    with closing(directory) as checkpoints:
        assert "what is damaged: 4 (metrics/metrics has " in capsys.readouterr().out
        assert int(checkpoints.restore(state(0))[0].step) == 2
    truncate(directory / "2/metrics/metrics", 0)
    refused("none of its checkpoints can be used: 2 ", Checkpoints, directory, WEIGHTS)
    assert steps_in(directory) == {"2", "4.damaged"}


def test_policy_and_base_that_are_removed_under_the_run_are_there_again_with_the_next_step(tmp_path):
    directory, base = tmp_path / "sft", state(7).params
    with closing(directory) as checkpoints:
        checkpoints.save(state(2), {}, base)
        checkpoints.manager.wait_until_finished()
        for name in ("policy", "base"):
            shutil.rmtree(directory / name)
        checkpoints.save(state(4), {}, base)
    assert (directory / "policy").is_dir() and checksums.find_damage(directory / "base") == ""
    with closing(directory) as checkpoints:
        assert int(checkpoints.restore(state(0))[0].step) == 4
        np.testing.assert_array_equal(checkpoints.restore_base(state(0).params)["head"][...], base["head"][...])


def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
    with closing(tmp_path / "sft") as checkpoints:
        checkpoints.save(state(2), {})
        refused("after update 4 1 of 2 parameters are not finite, such as head", checkpoints.save, state(4, np.inf), {})
    assert steps_in(tmp_path / "sft") == {"2"}


def test_a_save_that_failed_in_the_background_is_said_once_and_the_last_whole_one_is_kept(tmp_path, monkeypatch):
    """No room for the last file, which the step's commit waits for; with room the same step is saved after all."""
    directory = tmp_path / "sft"
    with closing(directory) as checkpoints:
        checkpoints.save(state(2), {})
        checkpoints.check()
    broken = OSError(28, "No space left on device", "checksums.json")
    with monkeypatch.context() as m, closing(directory) as checkpoints:
        m.setattr(checksums, "write_checksums", lambda _: (_ for _ in ()).throw(broken))
        checkpoints.save(state(4), {})
        while checkpoints.manager.is_saving_in_progress():
            time.sleep(0.01)
        refused(r"sft/4 cannot be written \(No space.*the last whole one is 2.*Make room", checkpoints.check)
    with closing(directory) as checkpoints:
        assert int(checkpoints.restore(state(0))[0].step) == 2
        checkpoints.save(state(4), {})
    assert steps_in(directory) == {"2", "4"}


def test_a_directory_that_is_removed_under_the_run_is_no_place_to_save_in(tmp_path):
    with closing(tmp_path / "sft") as checkpoints:
        checkpoints.save(state(2), {})
        checkpoints.finish()
        shutil.rmtree(tmp_path / "sft")
        refused("sft has been removed under the run", checkpoints.save, state(4), {})
    assert not (tmp_path / "sft").exists()


def test_what_is_kept_beside_the_newest(tmp_path):
    with closing(tmp_path / "sft", keep_last=1, keep_every=4) as checkpoints:
        for step in range(1, 11):
            checkpoints.save(state(step), {})
    assert steps_in(tmp_path / "sft") == {"4", "8", "10"}


def test_a_checkpoint_is_due_by_the_clock(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("rsagent_jax.train.checkpoint.time.monotonic", lambda: now[0])
    with closing(tmp_path / "sft", minutes=2.0) as checkpoints, closing(tmp_path / "grpo") as never:
        due = []
        for now[0] in (1100.0, 1121.0, 1122.0):
            due.append(checkpoints.due())
        checkpoints.save(state(1), {})
        assert due == [False, True, True] and not checkpoints.due() and not never.due()


def test_another_reference_of_the_kl_term_is_refused_with_the_step_that_was(saved, tmp_path):
    weights, directory = str(shutil.copytree(saved, tmp_path / "sft")), tmp_path / "grpo"
    directory.mkdir()
    began, later = state(4).params, state(4, 4.001).params
    check_reference(directory, began, weights, "float32", begins=True)
    check_reference(directory, began, weights, "float32", begins=False)
    shutil.copytree(saved / "4", pathlib.Path(weights) / "6")  # SFT went on
    again = functools.partial(check_reference, directory, later, weights, "float32", begins=False)
    said = refused("the reference of the KL term has changed", again)
    assert f"Put {weights}@4 back as it was, or" in said and f"{weights}@6" in said  # a stage of the same run
    (elsewhere := tmp_path / "other" / "grpo").mkdir(parents=True)
    shutil.copy(directory / FILE, elsewhere)
    elsewhere = (elsewhere, later, weights, "float32")
    refused(f"Give --config.policy.weights={weights}@4, or", check_reference, *elsewhere, begins=False)
    check_reference(directory, later, weights, "float32", begins=True)  # nothing had been saved: it begins anew
    assert json.loads((directory / FILE).read_text())["weights"] == f"{weights}@6"
    (directory / FILE).unlink()
    refused("reference.json is gone: .* Put it back", again)
    assert not (directory / FILE).exists()
