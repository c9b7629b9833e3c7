"""What each source of batches keeps, drops and counts."""

import dataclasses
import weakref

import numpy as np
import pytest
from agent_fakes import disc

from rsagent_jax.agent import environment
from rsagent_jax.agent.replay import replay
from rsagent_jax.config.reward import RewardGroup, RewardTerm
from rsagent_jax.config.schema import AgentConfig, BatchConfig, DataConfig, ReadConfig, SftConfig
from rsagent_jax.data import packing, trajectories
from rsagent_jax.data.npz import pack_record
from rsagent_jax.rewards import RewardError
from rsagent_jax.train import batch_source
from rsagent_jax.train.batch_source import SftSource
from rsagent_jax.types import DataError, Status, Trajectory
from tests.refusals import refused
from tests.rollout import small
from tests.rollout.small import trajectory
from tests.train.played import BATCH, Samples, iou, nothing_new, sample, source, step_of, trained


def test_advantages_are_taken_inside_groups_and_reach_every_token_of_their_trajectory():
    s = source([[trajectory(0, 20), trajectory(0, 10)], [trajectory(1, 14), trajectory(1, 18)]])
    batches, metrics = s.next(lambda: "params", "key")
    half = [round(abs(iou(a) - iou(b)) / 2, 5) for a, b in ((20, 10), (14, 18))]
    assert trained(batches) == {11: [-half[0], half[0]], 12: [-half[1], half[1]]}
    assert metrics["reward"] == pytest.approx(np.mean([iou(r) for r in (20, 10, 14, 18)]))
    assert metrics["giou"] == metrics["reward/final"] == pytest.approx(metrics["reward"])
    assert (metrics["trajectories"], metrics["zero_variance"], metrics["dropped"]) == (4.0, 0.0, 0.0)
    assert (metrics["turns"], metrics["endings/finished"], metrics["tool_seconds"]) == (1.0, 1.0, 2.0)
    assert metrics["fill"] == pytest.approx(4 * 25 / (len(batches) * 2 * 64))
    played = s.driver
    assert played.loaded == [("params", "key"), "released"]
    assert [t.uid for t in played.tasks] == [0, 1, 2, 3] and [t.group_id for t in played.tasks] == [0, 0, 1, 1]


def test_ciou_is_of_sums_and_images_are_counted_by_tokens():
    """One object found whole and a larger one found by a ninth, so the mean of IoUs is not the IoU of sums."""
    small_one, large_one = dataclasses.replace(sample(0), gt_mask=disc(56, 56, 28, 28, 8)), sample(1)
    broken_one = trajectory(1, 20, status=Status.ENV_FAILED)
    groups = [[trajectory(0, 8), trajectory(0, 8)], [trajectory(1, 7, images=2), broken_one]]
    _, metrics = source(groups, [small_one, large_one]).next(nothing_new, None)
    a, b, inside = (int(disc(56, 56, 28, 28, r).sum()) for r in (8, 20, 7))
    assert metrics["ciou"] == pytest.approx((2 * a + inside) / (2 * a + b))
    assert metrics["giou"] == pytest.approx((2 + inside / b) / 3)
    # 1 + 4 + 20 tokens with one image, 1 + 8 + 20 with two; the one that the tool broke takes its place as well
    assert metrics["image_tokens"] == pytest.approx((4 + 4 + 8 + 4) / (25 + 25 + 29 + 25))


def test_a_copy_of_the_policy_is_gone_when_the_rollouts_start(monkeypatch):
    """train.py hands it over without keeping a name: on a pod it is as large as the engine's weights."""

    class Copy:
        pass

    s, alive = source([[trajectory(0, 20), trajectory(0, 10)]]), []
    run = s.driver.run
    monkeypatch.setattr(s.driver, "load", lambda params, key: alive.append(weakref.ref(params)))
    monkeypatch.setattr(s.driver, "run", lambda tasks, *_: alive.append(alive[0]() is not None) or run(tasks))
    s.next(Copy, None)
    assert alive[1] is False


def test_a_broken_tool_is_dropped_from_its_group_and_enters_no_mean():
    broken = trajectory(0, 0, status=Status.ENV_FAILED)
    s = source([[trajectory(0, 20), broken, trajectory(0, 10)]])
    batches, metrics = s.next(nothing_new, None)
    half = round((1 - iou(10)) / 2, 5)  # of the two others, as if the group had two members
    assert trained(batches) == {11: [-half, half]}
    assert metrics["reward"] == metrics["giou"] == pytest.approx((1 + iou(10)) / 2)
    assert metrics["endings/env_failed"] == pytest.approx(1 / 3)
    assert [t["reward"] is None for t in s.examples["trajectories"]] == [False, True, False]


def test_a_group_with_one_sound_member_teaches_nothing():
    groups = [[trajectory(0, 20), trajectory(0, 0, status=Status.ENV_FAILED)], [trajectory(1, 20), trajectory(1, 10)]]
    batches, metrics = step_of(groups)
    assert list(trained(batches)) == [12] and metrics["zero_variance"] == 0.5


def broken(i: int, kind: str = "timeout") -> Trajectory:
    return dataclasses.replace(trajectory(i, 0, status=Status.ENV_FAILED), seconds={"tool": 0.5, "kind": kind})


def malformed(i: int, n: int) -> Trajectory:
    """One that never called a tool, so that it has no mask."""
    t = trajectory(i, 0, n=n, status=Status.INVALID)
    return dataclasses.replace(t, final_mask=np.zeros_like(t.final_mask))


def test_a_step_in_which_too_many_tools_broke_stops_before_the_update_and_counts_them_by_kind():
    groups = [[broken(0, "unavailable"), broken(0, "internal")], [broken(1), trajectory(1, 10)]]
    with pytest.raises(DataError, match=r"3 of this step's 4 .*\(unavailable 1, timeout 1, internal 1\)") as error:
        step_of(groups)
    said = ("grpo.max_env_failed = 0.5", "No update", "checkpoint is as it was", "side-car's log", "same command")
    assert all(words in str(error.value) for words in said)
    with pytest.raises(DataError, match=r"2 of this step's 2 .* segmenter"):  # nothing is left to judge
        step_of([[broken(0), broken(0)]], max_env_failed=1.0)


@pytest.mark.parametrize(("bound", "stops"), [(0.0, True), (0.4, True), (0.5, False), (1.0, False)])
def test_only_a_share_above_the_bound_stops_the_training(bound, stops):
    groups = [[broken(0, "unavailable"), trajectory(0, 15)], [broken(1), trajectory(1, 10)]]
    s = source(groups, max_env_failed=bound)
    if stops:
        refused(r"2 of this step's 4", s.next, nothing_new, None)
    else:
        _, metrics = s.next(nothing_new, None)
        assert {k: v for k, v in metrics.items() if k.startswith("env_failed/") and v} == {
            "env_failed/unavailable": 1.0,
            "env_failed/timeout": 1.0,
        }
    sound = source([[trajectory(0, 20), trajectory(0, 10)]], max_env_failed=0.0)
    assert sound.next(nothing_new, None)[1]["env_failed/timeout"] == 0.0


def test_trajectories_that_never_called_the_segmenter_do_not_speak_for_it():
    """A side-car that is gone: what is left are the malformed ones, and their rewards could still differ."""
    groups = [[broken(0), malformed(0, 18), malformed(0, 19), malformed(0, 20)]]
    refused(r"1 of this step's 1 trajectories that called the segmenter", step_of, groups)


def several_processes(monkeypatch, others: dict[str, int], batches: int) -> None:
    """Lets this process meet others that counted `others` and made `batches`."""

    def total(counts):
        names = ("called", "usable", "teaching", *batch_source.TOOL_FAILURES)
        return [n + others.get(name, 0) for name, n in zip(names, counts, strict=True)]

    monkeypatch.setattr(batch_source, "allgather_sum", total)
    monkeypatch.setattr(packing, "allgather_max", lambda n: max(n, batches))


def test_processes_stop_together_or_go_on_together_whatever_happened_on_one(monkeypatch):
    alone = source([[broken(0), broken(0)]])
    several_processes(monkeypatch, {"called": 6, "usable": 6, "teaching": 4}, batches=2)
    batches, metrics = alone.next(nothing_new, None)
    # 2 of 8 failed: here nothing is left, and two micro-batches are needed
    assert trained(batches) == {} and len(batches) == 2 and not any(b.segment_ids.any() for b in batches)
    assert metrics["no_update"] == 0.0 and metrics["endings/env_failed"] == 1.0 and "reward" not in metrics
    fine = source([[trajectory(0, 20), trajectory(0, 10)]])
    several_processes(monkeypatch, {"called": 6, "unavailable": 5}, batches=0)
    refused(r"5 of this step's 8 .*unavailable 5", fine.next, nothing_new, None)
    flat = source([[trajectory(0, 15), trajectory(0, 15)]], drop_zero_variance=False)
    several_processes(monkeypatch, {"usable": 4, "teaching": 2}, batches=1)
    assert trained(flat.next(nothing_new, None)[0]) == {11: [0.0, 0.0]}  # kept, as the step teaches elsewhere


def test_groups_of_equal_rewards_are_dropped_or_kept_with_advantage_0_as_the_config_says():
    groups = [[trajectory(0, 15), trajectory(0, 15)], [trajectory(1, 20), trajectory(1, 10)]]
    batches, metrics = step_of(groups)
    assert list(trained(batches)) == [12] and metrics["zero_variance"] == 0.5
    batches, _ = step_of(groups, drop_zero_variance=False)
    assert trained(batches)[11] == [0.0, 0.0]


def test_groups_within_the_least_spread_are_dropped_however_large_their_z_scores():
    groups = [[trajectory(0, 20), trajectory(0, 19)], [trajectory(1, 20), trajectory(1, 10)]]
    spread = float(abs(iou(20) - iou(19)))
    batches, metrics = step_of(groups, advantage="zscore", min_spread=spread + 0.01)
    assert list(trained(batches)) == [12] and metrics["zero_variance"] == 0.5
    batches, metrics = step_of(groups, advantage="zscore", min_spread=spread - 0.01)
    assert trained(batches)[11] == pytest.approx([-0.70711, 0.70711], abs=1e-4) and metrics["zero_variance"] == 0.0


@pytest.mark.parametrize("settings", [{}, {"drop_zero_variance": False}, {"min_spread": 2.0}])
def test_a_step_in_which_nothing_teaches_has_no_batch_and_is_counted(settings):
    last = trajectory(0, 10 if "min_spread" in settings else 15)
    batches, metrics = step_of([[broken(0), trajectory(0, 15), last]], **settings)
    assert batches == [] and metrics["no_update"] == 1.0 and metrics["zero_variance"] == 1.0
    assert (metrics["trajectories"], metrics["fill"], metrics["env_failed/timeout"]) == (0.0, 0.0, 1.0)
    _, metrics = step_of([[trajectory(0, 20), trajectory(0, 10)]])
    assert metrics["no_update"] == 0.0


def test_overlong_trajectories_are_trained_or_masked_as_the_config_says():
    group = [trajectory(0, 20, n=20), trajectory(0, 10, n=21, status=Status.MAX_CONTEXT)]
    assert len(trained(step_of([group], mask_overlong=False)[0])[11]) == 2
    batches, metrics = step_of([group])
    assert metrics["overlong"] == 0.5 and metrics["cut"] == 1.0  # no turn of these ends with a terminator
    kept = trained(batches)
    assert kept == {11: [round((1 - iou(10)) / 2, 5)]}  # its reward still counts in the mean


def test_a_trajectory_that_never_took_a_turn_has_a_reward_but_nothing_to_train():
    nothing = trajectory(0, 0, n=0, status=Status.MAX_CONTEXT)
    batches, metrics = step_of([[trajectory(0, 20), nothing]])
    assert trained(batches) == {11: [round((1 - iou(0)) / 2, 5)]} and metrics["dropped"] == 0.5
    refused(r"grpo\.sampling\.context", step_of, [[nothing, nothing]])


def test_a_trajectory_with_more_images_than_a_row_holds_is_dropped_and_counted():
    many = trajectory(0, 10, images=5)  # 5 windows of 16 patches, a row has 64
    batches, metrics = step_of([[trajectory(0, 20), many]])
    assert trained(batches) == {11: [round((1 - iou(10)) / 2, 5)]} and metrics["dropped"] == 0.5


def test_the_trajectory_that_a_reward_fails_on_is_kept(tmp_path):
    (tmp_path / "bad_reward.py").write_text("def f(trajectory, sample):\n    return trajectory.nothing\n")
    reward = (RewardGroup("own", 1.0, (RewardTerm(f"{tmp_path}/bad_reward.py:f"),)),)
    s = source([[trajectory(0, 20), trajectory(0, 10)]], reward=reward)
    image = sample(0)
    state = environment.reset(image.image, image.query, AgentConfig(), small.processor().images.limits)
    state = environment.abort(state, Status.MAX_CONTEXT)
    run, s.workdir = s.driver.run, tmp_path
    s.driver.run = lambda tasks, *_: [(t, state) for t, _ in run(tasks)]
    says = r"own/f .*AttributeError for sample s0: .*bad_reward.py, line 2.*\n.*reward_err"
    with pytest.raises(RewardError, match=says):
        s.next(nothing_new, None)
    kept = replay((tmp_path / "reward_error.json").read_text(), image.image)
    assert (kept.query, kept.status) == (image.query, Status.MAX_CONTEXT)


def test_a_sample_that_cannot_be_read_leaves_its_place_empty_and_is_counted():
    groups = [[trajectory(i, 20), trajectory(i, 10)] for i in range(3)]
    whole = source(groups)
    whole.next(nothing_new, None)
    uids = {t.sample.id: t.uid for t in whole.driver.tasks}
    s = source(groups, Samples(range(3), {1}), read=ReadConfig(threads=1, ahead=1))
    batches, metrics = s.next(nothing_new, None)
    played = s.driver
    assert sorted(trained(batches)) == [11, 13] and metrics["unreadable"] == 1.0
    assert {t.sample.id: t.uid for t in played.tasks} == {id: uid for id, uid in uids.items() if id != "s1"}
    assert [t.group_id for t in played.tasks] == [0, 0, 1, 1] and s.state() == {"position": 3, "skipped": 1}
    s.restore({"position": 3})  # of a checkpoint from before they were counted
    assert s.next(nothing_new, None)[1]["unreadable"] == 1.0
    s = source(groups, Samples(range(3), {1}), data=DataConfig(unreadable="stop"))
    refused("cannot be read: sample 1 .s1.: picture 1 is missing", s.next, nothing_new, None)


# --- Stored trajectories ---


def store(directory, stored):
    """Trajectories without images, or bytes that are none."""
    writer = trajectories.RecordWriter(directory)
    for t in stored:
        record = t if isinstance(t, bytes) else {"tokens": t.tokens, "positions": t.positions, "sampled": t.loss_mask}
        writer.write(record if isinstance(t, bytes) else pack_record({}, record))
    writer.close({})
    return directory


def test_a_stored_trajectory_that_cannot_be_read_is_counted_and_the_others_are_learnt_from(tmp_path):
    store(tmp_path, [b"nonsense" if i == 2 else trajectory(i, 10, n=12, images=0) for i in range(4)])
    s = sft(tmp_path, trajectories_per_step=4)
    batches, metrics = s.next(None, None)
    assert ids(batches) == [0, 1, 3] and metrics["unreadable"] == 1.0 and metrics["trajectories"] == 3.0
    with pytest.raises(DataError, match="cannot be read: .*, record 2: a stored trajectory cannot be read"):
        sft(tmp_path, trajectories_per_step=4, unreadable="stop").next(None, None)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Ten trajectories without images; number 3 is longer than a row."""
    stored = [trajectory(i, 10, n=70 if i == 3 else 12, images=0) for i in range(10)]
    return store(tmp_path_factory.mktemp("set"), stored)


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


def test_the_number_of_steps_follows_the_epochs_unless_it_is_given(stored):
    for config, steps in (({"epochs": 2.0}, 4), ({"epochs": 0.01}, 1), ({"steps": 7}, 7)):
        assert sft(stored, **config).steps == steps


def test_a_step_of_which_nothing_fits_is_a_data_error(stored):
    with pytest.raises(DataError, match=r"sft\.batch\.tokens"):
        sft(stored, batch=BatchConfig(rows=2, tokens=8, patches=16)).next(None, None)
