"""What is kept of a step beside a stage's checkpoints: when it is written, when it is used, and when it goes."""

import json
import types

import pytest

from rsagent_jax.data.npz import pack_record
from rsagent_jax.runtime import preemption
from rsagent_jax.train.batch_source import GrpoSource
from rsagent_jax.train.under_way import UnderWay


def record(uid: int, turns: int) -> bytes:
    return pack_record({"uid": uid, "turns": turns, "replay": json.dumps({"status": None})}, {})


def stage(tmp_path, newest: int, records=()) -> UnderWay:
    source = GrpoSource.__new__(GrpoSource)
    source.kept, source.under_way, source.state = {}, lambda: list(records), dict
    nothing = lambda: None  # noqa: E731
    saved = types.SimpleNamespace(directory=tmp_path / "grpo", newest=newest, check=nothing)
    return UnderWay(saved, source, updates=2, flush=nothing)


@pytest.fixture
def signal(monkeypatch):
    """What a signal would do at this moment."""
    asked = []
    monkeypatch.setattr(preemption, "meanwhile", asked.append)
    return lambda: asked[-1]()


def test_a_rollout_is_kept_while_its_update_is_made_if_the_state_before_it_is_saved(tmp_path, signal, capsys):
    state = types.SimpleNamespace(step=4)  # of two updates each: step 3 comes
    for newest, there in (2, False), (4, True):
        under_way = stage(tmp_path, newest, [record(5, 2), record(6, 1)])
        with under_way.making(3, state, None):
            signal()
            assert not under_way.directory.exists()  # while it is played the driver's own thread sees to that
        signal()
        assert under_way.directory.exists() == there
    wrong, right = stage(tmp_path, 2), stage(tmp_path, 4)
    wrong.take_up(1)
    assert wrong.source.kept == {} and capsys.readouterr().out == ""
    right.source.kept = {}
    right.take_up(2)
    assert right.source.kept == {5: record(5, 2), 6: record(6, 1)}
    assert (
        capsys.readouterr().out
        == "grpo: goes on within step 3, of which 2 trajectories (0 of them whole, 3 turns) are kept\n"
    )
    right.forget(2)
    assert right.directory.exists()
    right.forget(3)
    assert not right.directory.exists()


def test_of_several_sets_the_trajectory_that_has_come_further_counts_and_a_damaged_set_is_said(tmp_path, capsys):
    under_way = stage(tmp_path, 4, [record(5, 2)])
    under_way._write(3)
    under_way.directory.joinpath("00000-of-00001").rename(under_way.directory / "00001-of-00002")
    under_way.source.under_way = lambda: [record(5, 1000), record(7, 1)]
    under_way._write(3)
    under_way.take_up(2)
    assert under_way.source.kept == {5: record(5, 1000), 7: record(7, 1)}
    capsys.readouterr()
    (shard,) = under_way.directory.glob("00001-of-00002/*.array_record")
    shard.write_bytes(b"nothing")
    under_way.source.kept = {}
    under_way.take_up(2)
    assert f"warning: {shard.parent} is damaged, and its trajectories are played anew" in capsys.readouterr().out
    assert sorted(under_way.source.kept) == [5, 7]
