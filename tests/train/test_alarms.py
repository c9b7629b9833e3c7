"""Each alarm is provoked by a stream of figures made by hand; each is said once, and not again after a resume."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rsagent_jax.config.alarms import AlarmsConfig
from rsagent_jax.train import alarms, losses
from rsagent_jax.train.alarms import ALARMS, Alarms, Watch
from tests.refusals import refused

# A step in which nothing is wrong.
SOUND = {
    "zero_variance": 0.25,
    "turns": 3.1,
    "behaviour/calls": 1.9,
    "reward/format": 0.9,
    "giou": 0.5,
    "ciou": 0.5,
    "l2_grads": 1.0,
    "kl_ref": 0.02,
    "mismatch_kl": 0.001,
    "endings/env_failed": 0.0,
    "cut": 0.05,
    "endings/max_context": 0.1,
    "entropy_sampled": 0.4,
    "image_tokens": 0.6,
}
EXAMPLES = {
    "id": "s1",
    "query": "the left cup",
    "trajectories": [
        {"status": "finished", "turns": [f"<think>{i}</think>", "done"], "advantage": 0.0, "reward": {"total": i}}
        for i in range(4)
    ],
}


def stream(*runs: tuple[int, dict]) -> list[dict]:
    """SOUND for as many steps as each run says, with what differs."""
    return [SOUND | other for count, other in runs for _ in range(count)]


def occurrences(rows, bounds=AlarmsConfig()) -> list[tuple[str, int, int]]:
    """(alarm, the step that it is said after, since when)."""
    watch, out = Watch(bounds), []
    for step, row in enumerate(rows, start=1):
        out += [(name, step, symptom.since) for name, symptom in watch.add(step, row)[1].items()]
    return out


def test_a_sound_run_says_nothing_whatever_is_not_logged():
    assert occurrences(stream((60, {}))) == []
    assert occurrences([{"loss": 0.5, "lr": 1e-5}] * 60) == []  # SFT without any of them
    assert occurrences([dict.fromkeys(SOUND)] * 60) == []  # not finite, as metrics.jsonl has it


LEVELS = [
    ("flat_groups", {"zero_variance": 1.0}),
    ("one_call", {"behaviour/calls": 0.97}),
    ("one_call", {"turns": 1.0}),
    ("env_failures", {"endings/env_failed": 0.2}),
    ("reward_failures", {"reward_failed": 0.15}),
    ("truncation", {"cut": 0.3}),
    ("truncation", {"endings/max_context": 0.25}),
    ("no_entropy", {"entropy_sampled": 0.002}),
    ("image_share", {"image_tokens": 0.95}),
]


@pytest.mark.parametrize(("name", "wrong"), LEVELS)
def test_a_figure_beyond_its_bound_three_steps_in_a_row(name, wrong):
    assert occurrences(stream((4, {}), (2, wrong), (4, {}))) == []  # two are not three
    assert occurrences(stream((4, {}), (30, wrong))) == [(name, 7, 5)]  # said once, however long


def test_an_occurrence_ends_after_ten_steps_without_it():
    flat = {"zero_variance": 1.0}
    soon = occurrences(stream((5, flat), (5, {}), (5, flat)))
    later = occurrences(stream((5, flat), (8, {}), (5, flat)))  # 3 more until it is one again
    assert soon == [("flat_groups", 3, 1)] and later == [("flat_groups", 3, 1), ("flat_groups", 16, 14)]


@pytest.mark.parametrize(("name", "key"), [("gradient_explodes", "l2_grads"), ("kl_explodes", "kl_ref")])
def test_a_figure_that_explodes_against_its_own_median(name, key):
    grown = {key: SOUND[key] * 11}
    assert occurrences(stream((9, {}), (1, grown))) == []  # nine values are no median
    assert occurrences(stream((10, {}), (1, grown), (3, {}))) == [(name, 11, 11)]
    assert occurrences(stream((10, {}), (1, {key: SOUND[key] * 9}))) == []
    # Steps without an update log a norm of 0, which would pull the median down.
    assert occurrences(stream((10, {}), (40, {key: 0.0}), (1, {key: SOUND[key] * 9}))) == []


def test_a_kl_next_to_nothing_never_explodes():
    assert occurrences([SOUND | {"kl_ref": 1e-6}] * 20 + [SOUND | {"kl_ref": 0.009}]) == []


def test_format_full_while_iou_falls():
    full, low = {"reward/format": 0.99}, {"reward/format": 0.99, "giou": 0.44, "ciou": 0.44}
    # The best window is steps 1 to 10; after 9 of 10 steps at 0.44 the mean is 0.446, 0.054 lower.
    assert occurrences(stream((10, full), (8, low))) == []
    said = occurrences(stream((10, {}), (10, low)))
    assert said == [("format_saturated", 20, 11)]
    assert occurrences(stream((10, {}), (30, {"giou": 0.44, "ciou": 0.44}))) == []  # the format still teaches
    assert occurrences(stream((10, full), (30, full | {"giou": 0.46, "ciou": 0.46}))) == []  # 0.04 is less than 0.05


def test_a_fall_that_the_noise_of_the_steps_explains_is_none():
    """0.5 +- 0.3 and then 0.4 +- 0.3, step by step: 3 errors of the difference are 0.4."""
    full = {"reward/format": 1.0}
    rows = [SOUND | full | {"giou": m + s, "ciou": m + s} for m in (0.5, 0.4) for _ in range(5) for s in (0.3, -0.3)]
    assert occurrences(rows) == []


def test_giou_and_ciou_part():
    apart = {"giou": 0.56, "ciou": 0.47}
    # The first window is steps 1 to 10. After 6 of 10 steps: 0.036 up and 0.018 down; after 5 of them 0.045 apart.
    assert occurrences(stream((20, {}), (10, apart))) == [("ious_part", 26, 17)]
    together = {"giou": 0.60, "ciou": 0.51}
    assert occurrences(stream((10, {}), (20, together))) == []  # both have risen
    text = watch_text(stream((20, {}), (10, {"giou": 0.47, "ciou": 0.56})))
    assert "gIoU has gone -0.018 and cIoU +0.036 since steps 1-10: small masks go wrong" in text


def watch_text(rows) -> str:
    watch = Watch(AlarmsConfig())
    return " ".join(f.text for step, row in enumerate(rows, 1) for f in watch.add(step, row)[1].values())


def test_an_engine_gap_is_said_at_once_and_stops_the_run_if_wanted(tmp_path):
    rows = stream((2, {}), (1, {"mismatch_kl": 0.2}))
    assert occurrences(rows) == [("engine_gap", 3, 3)]
    alarms = Alarms(AlarmsConfig(stop_on_gap=True), tmp_path, "grpo")
    alarms.add(1, rows[0], EXAMPLES)
    message = refused("grpo step 2: engine and trainer are 0.2 nats per token apart", alarms.add, 2, rows[2], EXAMPLES)
    assert "alarms.stop_on_gap" in message
    assert [row["alarm"] for row in lines(tmp_path)] == ["engine_gap"]  # said before the end


def test_what_older_weights_drew_is_no_gap_of_the_engine():
    apart = {"mismatch_kl": 0.2}
    assert occurrences(stream((3, apart | {"staleness_max": 1.0}))) == []
    said = occurrences(stream((2, {"staleness_max": 1.0}), (1, apart | {"staleness_max": 0.0})))
    assert said == [("engine_gap", 3, 3)]


def test_an_engine_gap_is_found_in_what_the_correction_before_several_updates_returns(tmp_path):
    """log 2 apart in each of 4 tokens: the k3 estimate is 2 - 1 - log 2 = 0.307."""
    trainer, engine, mask = np.full((1, 4), np.log(0.5)), np.full((1, 4), np.log(0.25)), np.ones((1, 4), bool)
    _, sums = losses.truncated_importance_weights(jnp.array(trainer), jnp.array(engine), jnp.array(mask), cap=2.0)
    corrected = jax.device_get(losses.mean_metrics(sums))
    alarms = Alarms(AlarmsConfig(stop_on_gap=True), tmp_path, "grpo")
    refused("engine and trainer are 0.307 nats per token apart", alarms.add, 1, SOUND | corrected, {})


def lines(directory) -> list[dict]:
    path = directory / "alarms.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_every_alarm_can_be_switched_off():
    off = AlarmsConfig(
        **dict.fromkeys(("one_call", "explode", "gap", "entropy"), 0.0),
        **dict.fromkeys(("iou_fall", "parting", "env_failed", "reward_failed", "truncated", "image_tokens"), 1.0),
    )
    rows = stream((12, {}), *((12, wrong) for name, wrong in LEVELS if name != "flat_groups"))
    rows += stream((12, {"mismatch_kl": 9.0, "l2_grads": 99.0, "kl_ref": 99.0, "giou": 0.9, "ciou": 0.1}))
    assert len(occurrences(rows)) >= 10 and occurrences(rows, off) == []


def test_what_is_printed_and_written(tmp_path, capsys):
    alarms = Alarms(AlarmsConfig(), tmp_path, "grpo")
    for step, row in enumerate(stream((2, {}), (6, {"zero_variance": 1.0})), start=1):
        alarms.add(step, row, EXAMPLES)
    alarms.close()
    head, *shown, last = capsys.readouterr().out.splitlines()
    assert head.startswith("ALARM flat_groups, grpo step 5, since step 3: in every group all rewards are the same")
    assert "raise grpo.sampling.temperature" in head
    assert shown == [f"    finished, reward {i}.00: <think>{i}</think> | done" for i in range(3)]
    assert last == f"grpo: 1 alarms (flat_groups 1); see {tmp_path}/alarms.jsonl"
    (row,) = lines(tmp_path)
    assert (row["stage"], row["step"], row["alarm"], row["since"]) == ("grpo", 5, "flat_groups", 3)
    assert row["sentence"] in head and row["examples"] == EXAMPLES | {"trajectories": EXAMPLES["trajectories"][:3]}


def test_other_processes_keep_it_to_their_file(tmp_path, capsys):
    alarms = Alarms(AlarmsConfig(), tmp_path, "grpo", lead=False)
    for step in (1, 2, 3):
        alarms.add(step, SOUND | {"zero_variance": 1.0}, {})
    alarms.close()
    assert capsys.readouterr().out == "" and [row["examples"] for row in lines(tmp_path)] == [None]


def test_a_resume_says_nothing_twice_and_forgets_what_was_undone(tmp_path, capsys):
    """One run of 30 steps, and one that was killed after step 24 and goes on from the checkpoint of step 20."""
    rows = stream((4, {}), (10, {"zero_variance": 1.0}), (4, {}), (12, {"cut": 0.5}))  # truncation in step 21
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for directory, starts in (whole, [(0, 30)]), (resumed, [(0, 24), (20, 30)]):
        directory.mkdir()
        for done, end in starts:
            logged = [json.dumps({"step": s, "stage": "grpo", **rows[s - 1]}) for s in range(1, done + 1)]
            (directory / "metrics.jsonl").write_text("".join(f"{line}\n" for line in logged))
            alarms = Alarms(AlarmsConfig(), directory, "grpo", done)
            for step in range(done + 1, end + 1):
                alarms.add(step, rows[step - 1], EXAMPLES)
            alarms.close()
    assert [(row["alarm"], row["step"]) for row in lines(whole)] == [("flat_groups", 7), ("truncation", 21)]
    assert lines(resumed) == lines(whole)
    assert capsys.readouterr().out.count("ALARM flat_groups") == 2  # once in each of the two runs


def test_stages_do_not_mix(tmp_path):
    for stage in ("sft", "grpo"):
        alarms = Alarms(AlarmsConfig(), tmp_path, stage)
        for step in range(1, 12):
            alarms.add(step, {"l2_grads": 1.0 if step < 11 else 50.0}, {})
        alarms.close()
    assert [(row["stage"], row["alarm"]) for row in lines(tmp_path)] == [
        ("sft", "gradient_explodes"), ("grpo", "gradient_explodes")
    ]  # fmt: skip
    Alarms(AlarmsConfig(), tmp_path, "grpo", done=5)
    assert [row["stage"] for row in lines(tmp_path)] == ["sft"]


def test_each_is_named_and_explained():
    names = {alarm.__name__ for alarm in ALARMS} | {name for name, *_ in alarms.LEVELS}
    documented = pathlib.Path("docs/alarms.md").read_text()
    assert len(names) == 12 and all(f"| `{name}` |" in documented for name in names) and all(a.__doc__ for a in ALARMS)
