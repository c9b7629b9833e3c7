"""A step's figures from trajectories that are worked out by hand; what no dump is, is refused."""

import dataclasses
import shutil
import types

import jax
import numpy as np
import pytest
from agent_fakes import DiscSegmenter

from rsagent_jax.config.schema import BatchConfig, GrpoConfig
from rsagent_jax.data import trajectories
from rsagent_jax.masks import mask_iou
from rsagent_jax.report.rows import RowIndex
from rsagent_jax.report.trajectory import play
from rsagent_jax.rollout.driver import Driver
from rsagent_jax.rollout.policy import TextPolicy
from rsagent_jax.runtime import image_files, processes
from rsagent_jax.runtime.processes import Share
from rsagent_jax.runtime.train_log import MetricsLog
from rsagent_jax.train.judged import Judged, ReplaySource, dump_rollouts, replays, rollout_figures
from rsagent_jax.types import Sample, Status, Turn
from tests.refusals import refused
from tests.rollout import small

TRUTH = np.arange(16).reshape(4, 4) < 8
SAMPLE = Sample("s0", np.zeros((4, 4, 3), np.uint8), "q", TRUTH)


def covering(pixels: int) -> types.SimpleNamespace:
    """The first so many pixels of the truth: IoU pixels / 8."""
    return types.SimpleNamespace(mask=np.arange(16).reshape(4, 4) < pixels)


def judged(masks: list[int], logprobs: list[float], forced: int, final=-1, status=Status.FINISHED) -> Judged:
    calls = [small.click(1, 1)] * len(masks) + [small.finish(1)]
    mask = np.concatenate([np.zeros(forced, bool), np.ones(len(logprobs), bool)])
    t = dataclasses.replace(
        small.trajectory(0, 1.0),
        status=status,
        turns=tuple(Turn(text, None, None, None) for text in calls),
        masks=tuple(covering(n) for n in masks),
        final_mask=covering(masks[final]).mask,
        tokens=np.zeros(len(mask), np.int32),
        loss_mask=mask,
        logprobs=np.concatenate([np.zeros(forced), logprobs]).astype(np.float32),
    )
    return Judged(SAMPLE, t, None, None, 0.0, True)


def test_figures_of_a_step():
    step = [
        judged([2, 8], [-1.0, -2.0], forced=4),  # first 0.25, recovered
        judged([8, 6], [-3.0, -4.0, -5.0], forced=5),  # 1.0, then 0.75 is committed
        judged([1], [-9.0], forced=9, status=Status.ENV_FAILED),  # measures nothing
    ]
    out = rollout_figures(step)
    assert out["behaviour/first_iou"] == pytest.approx((0.25 + 1.0) / 2, abs=1e-4)
    assert out["behaviour/recovery"] == 1.0 and out["behaviour/harm"] == 0.0 and out["behaviour/calls"] == 2.0
    assert out["best_iou_gap"] == pytest.approx((0.0 + 0.25) / 2, abs=1e-4)
    assert (out["length/mean"], out["length/max"], out["length/sampled"]) == (7.0, 8.0, 2.5)
    assert out["length/turn"] == 5 / 6 and out["entropy/drawn"] == pytest.approx(15 / 5)
    assert rollout_figures([step[2]]) == rollout_figures([]) == {}


def clicked(places: range) -> tuple[list[Judged], Driver]:
    """Trajectories with these places as their advantages, and so many clicks; each is a group."""
    tasks = [small.task(i, h=56, w=56) for i in places]
    scripts = {f"s{i}": (*[small.click(20, 30)] * i, small.finish(None)) for i in places}
    policy = TextPolicy(small.scripted(scripts), small.processor())
    driver = Driver(policy, DiscSegmenter(), small.processor(), small.AGENT)
    samples = {f"s{i}": small.sample(i, 56, 56) for i in places}
    played = sorted(driver.run(tasks), key=lambda outcome: outcome[0].sample_id)
    return [
        Judged(samples[t.sample_id], t, state, None, float(i), True)
        for i, (t, state) in zip(places, played, strict=True)
    ], driver


def dump(directory, places: range, share: Share, **how) -> None:
    step, driver = clicked(places)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: share.count)
        dump_rollouts(directory, 1, step, driver, share, **how)


def test_the_advantage_that_is_shown_is_that_of_the_whole_reward():
    """Of three prompt tokens without an advantage, then two turns with one each."""
    two = judged([8], [-1.0, -1.0], forced=3)
    by_turn = dataclasses.replace(two, advantage=np.array([0.0, 0.0, 0.0, -1.5, 0.5], np.float32))
    assert by_turn.whole_advantage == -1.5 and dataclasses.replace(two, advantage=0.25).whole_advantage == 0.25


def taught(batches) -> list[list[float]]:
    """The advantages in each batch."""
    return [sorted({float(a) for a in b.advantages[b.loss_mask]}) for b in batches]


def test_a_replay_has_the_trajectories_of_all_processes_in_the_minibatches_of_the_step(tmp_path):
    dump(tmp_path / "dumps/step_000001", range(3), Share(0, 2))
    dump(tmp_path / "process_1/dumps/step_000001", range(3, 4), Share(1, 2))
    lead = str(tmp_path / "dumps/step_000001")
    config = GrpoConfig(batch=BatchConfig(rows=2, tokens=2000, patches=512), minibatches=2)
    batches, _ = ReplaySource(config, lead, small.processor(), Share()).next(*"ab")
    assert taught(batches) == [[1.0, 3.0], [0.0, 2.0]]  # dealt out by length
    parts = [ReplaySource(config, lead, small.processor(), Share(i, 2)) for i in range(2)]
    assert [len(part.records) for part in parts] == [3, 1]
    assert taught(parts[0].next(*"ab")[0]) == [[0.0, 2.0], [1.0]]
    shutil.rmtree(tmp_path / "process_1")
    refused("2 processes played this step, and .*process_1.* is not there", ReplaySource, config, lead, None, Share())


def test_a_dump_says_with_which_prompt_and_sizes_it_was_played(tmp_path, capsys):
    dump(tmp_path, range(1), Share())
    _, driver = clicked(range(1))
    trajectories.check_collected(tmp_path, driver.agent, driver.limits)
    assert not capsys.readouterr().out  # no note that it does not say
    other = dataclasses.replace(driver.agent, history_size=driver.agent.history_size + 28)
    refused("agent.history_size: ", trajectories.check_collected, tmp_path, other, driver.limits)


def test_the_newest_dumps_stay(tmp_path):
    """Step 30 is of a start that was killed and goes on after step 10: older ones than the one that is written go."""
    for step, keep, there in ((10, 0, [10]), (30, 0, [10, 30]), (20, 2, [10, 20, 30]), (25, 2, [20, 25, 30])):
        dump(tmp_path / f"step_{step:06d}", range(1), Share(), keep=keep)
        assert sorted(d.name for d in tmp_path.iterdir()) == [f"step_{n:06d}" for n in there]


def test_a_set_that_is_no_dump_or_teaches_nothing_is_refused_on_all_processes(tmp_path, monkeypatch):
    stored = small.store(tmp_path / "set", [small.task(0)], {"s0": (small.finish(None),)})
    source = ReplaySource(GrpoConfig(), str(stored), small.processor(), Share())
    said = []
    monkeypatch.setattr(processes, "exchange", lambda state: said.append(state) or [state])
    refused("record 0 has no log-probs and advantage; give a directory that grpo.dump_every wrote", source.next, *"ab")
    assert said == ["failed 2"]  # the others hear of it
    refused("holds no complete set", ReplaySource, GrpoConfig(), str(tmp_path), small.processor(), Share())


def test_the_viewer_has_the_rows_of_a_dump_once_it_is_whole_with_masks_and_truth(tmp_path):
    dump(tmp_path / "dumps/step_000001", range(1, 3), Share())
    index = RowIndex(tmp_path)
    index.refresh()
    rows = list(index.rows.values())
    values = [tuple(row.values[name] for name in ("turns", "advantage", "step", "iou")) for row in rows]
    assert values == [(2, 1.0, 1, 0.0), (3, 2.0, 1, 0.0)] and [row.sample for row in rows] == ["s1", "s2"]
    film = play(index.example(rows[1]), tmp_path)
    assert len(film.masks) == 2 and film.truth.path.startswith("M") and film.answer_id is None
    step, _ = clicked(range(1, 3))
    assert index.example(rows[1]).ious == tuple(mask_iou(m.mask, step[1].sample) for m in step[1].trajectory.masks)
    assert index.record(rows[1]) is not None
    (tmp_path / "dumps/step_000001" / trajectories.STAMP).unlink()
    index.refresh()
    assert not index.rows


def test_the_viewer_plays_what_rollouts_jsonl_keeps_of_a_steps_first_group(tmp_path):
    step, _ = clicked(range(1, 3))
    image_files.write_whole(tmp_path / "i.png", image_files.png(step[0].sample.image))
    step[0] = dataclasses.replace(step[0], sample=dataclasses.replace(step[0].sample, path="i.png"))
    told = {"status": "finished", "turns": ["a", "b"], "advantage": 1.0, "reward": {"total": 0.5}}
    log = MetricsLog(tmp_path)
    log.examples(4, {"id": "s1", "query": "q", "trajectories": [told]} | replays(step))
    log.close()
    index = RowIndex(tmp_path)
    index.refresh()
    (new,) = index.rows.values()
    assert (new.values["step"], new.values["iou"], new.values["reward"]) == (4, 0.0, 0.5)
    example = index.example(new)
    assert example.ious == (mask_iou(step[0].trajectory.masks[0].mask, step[0].sample),)
    assert len(play(example, tmp_path).masks) == 1
    assert replays([]) == {}
