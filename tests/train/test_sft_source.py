"""What the source of stored trajectories keeps, drops and counts."""

import pytest

from rsagent_jax.config.schema import BatchConfig, SftConfig
from rsagent_jax.data import trajectories
from rsagent_jax.data.npz import pack_record
from rsagent_jax.train.batch_source import SftSource
from rsagent_jax.types import DataError
from tests.rollout import small
from tests.rollout.small import trajectory

BATCH = BatchConfig(rows=2, tokens=64, patches=64)


def record(t) -> bytes:
    """Of a trajectory without images."""
    return pack_record({}, {"tokens": t.tokens, "positions": t.positions, "sampled": t.loss_mask})


def test_a_stored_trajectory_that_cannot_be_read_is_counted_and_the_others_are_learnt_from(tmp_path):
    writer = trajectories.RecordWriter(tmp_path)
    for i in range(4):
        t = trajectory(i, 10, n=12, images=0)
        writer.write(b"nonsense" if i == 2 else record(t))
    writer.close({})
    s = sft(tmp_path, trajectories_per_step=4)
    batches, metrics = s.next(None, None)
    assert ids(batches) == [0, 1, 3] and metrics["unreadable"] == 1.0 and metrics["trajectories"] == 3.0
    with pytest.raises(DataError, match="cannot be read: .*, record 2: a stored trajectory cannot be read"):
        sft(tmp_path, trajectories_per_step=4, unreadable="stop").next(None, None)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Ten trajectories without images; number 3 is longer than a row."""
    directory = tmp_path_factory.mktemp("set")
    writer = trajectories.RecordWriter(directory)
    for i in range(10):
        t = trajectory(i, 10, n=70 if i == 3 else 12, images=0)
        writer.write(record(t))
    writer.close({})
    return directory


def sft(stored, **config) -> SftSource:
    settings = SftConfig(**{"trajectories": str(stored), "trajectories_per_step": 5, "batch": BATCH} | config)
    return SftSource(settings, small.processor(), seed=1)


def ids(batches) -> list[int]:
    return sorted(t - 11 for b in batches for t in set(b.tokens[b.loss_mask].tolist()))


def test_over_long_stored_trajectories_are_dropped_and_counted(stored):
    s = sft(stored)
    steps = [s.next(None, None) for _ in range(4)]
    assert sorted(ids(steps[0][0]) + ids(steps[1][0])) == sorted(ids(steps[2][0]) + ids(steps[3][0]))
    assert sorted(ids(steps[0][0]) + ids(steps[1][0])) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert [m["dropped"] for _, m in steps] in ([0, 1, 1, 2], [1, 1, 2, 2], [1, 1, 1, 2], [0, 1, 2, 2])
    assert [m["epoch"] for _, m in steps] == [0.5, 1.0, 1.5, 2.0]
    assert all(m["trajectories"] == len(ids(b)) for b, m in steps)
    assert not any(b.advantages.any() or b.old_logprobs.any() for batches, _ in steps for b in batches)


def test_each_epoch_has_its_own_order_and_a_saved_position_continues_it(stored):
    def order(s, n):
        return [ids(s.next(None, None)[0]) for _ in range(n)]

    whole = order(sft(stored, trajectories_per_step=1, batch=BatchConfig(rows=1, tokens=80, patches=16)), 20)
    assert sorted(whole[:10]) == sorted(whole[10:]) == [[i] for i in range(10)] and whole[:10] != whole[10:]
    s = sft(stored, trajectories_per_step=1, batch=BatchConfig(rows=1, tokens=80, patches=16))
    order(s, 7)
    state = s.state()
    resumed = sft(stored, trajectories_per_step=1, batch=BatchConfig(rows=1, tokens=80, patches=16))
    resumed.restore(state)
    assert order(resumed, 13) == whole[7:]


def test_the_number_of_steps_follows_the_epochs_unless_it_is_given(stored):
    for config, steps in (({"epochs": 2.0}, 4), ({"epochs": 0.01}, 1), ({"steps": 7}, 7)):
        assert sft(stored, **config).steps == steps


def test_a_step_of_which_nothing_fits_is_a_data_error(stored):
    with pytest.raises(DataError, match=r"sft\.batch\.tokens"):
        sft(stored, batch=BatchConfig(rows=2, tokens=8, patches=16)).next(None, None)
