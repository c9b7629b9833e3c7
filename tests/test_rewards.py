"""Reward terms against hand arithmetic, their composition, and `module:function` resolution."""

import dataclasses
import json
import pickle
import re
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsagent_jax import rewards
from rsagent_jax.agent.tools import Finish, ResetView, Rotate, Segment, Zoom
from rsagent_jax.config.import_path import import_path
from rsagent_jax.config.reward import DEFAULT_REWARD, RewardGroup, RewardTerm
from rsagent_jax.rewards import RewardError, make_scorer, read_only
from rsagent_jax.types import MaskRecord, ParseError, Status, Trajectory, Turn
from tests.evals.test_metrics import row, sample  # row(n) against row(m): IoU = min(n, m) / max(n, m)
from tests.refusals import refused

BOX = Segment(box=(0, 0, 5, 1))
ERROR = ParseError("bad_json", "…")


def turn(call, error=None, repeated=False):
    return Turn(text="", call=call, error=error, observation=None, repeated=repeated)


def trajectory(turns=(), masks=(), final=None, status=Status.FINISHED):
    records = tuple(MaskRecord(i + 1, m, 0.9, "") for i, m in enumerate(masks))
    final = row(0) if final is None else final
    return Trajectory("s", 0, "the row", tuple(turns), records, final, None, status, *[np.zeros(0)] * 5, ())


def make_reward(groups):
    """The reward of one trajectory by itself; raises the error that it has instead."""
    score = make_scorer(groups)

    def reward(trajectory, sample):
        (scored,) = score([[trajectory]], [sample])
        if isinstance(scored, RewardError):
            raise scored
        return scored

    return reward


OWN = """import numpy as np

def constant(trajectory, sample, value=3): return value
def array_term(trajectory, sample): return np.zeros(1000)
def scaled(trajectory, sample, by, words=()): return by * (1 + len(words))
def positional(trajectory): return 0.0
def divides(trajectory, sample):
    nothing = len(trajectory.turns)
    return 1 / nothing
def writes_mask(trajectory, sample):
    sample.gt_mask[:] = trajectory.final_mask
    return 1.0
def writes_record(trajectory, sample):
    trajectory.masks[0].mask[:] = True
    return 1.0
"""


@pytest.fixture
def own(tmp_path, imports_restored):
    """A researcher's file somewhere."""
    path = tmp_path / "my_rewards.py"
    path.write_text(OWN)
    sys.modules.pop("my_rewards", None)  # the README's, of another test
    return path


@pytest.mark.parametrize(
    ("final", "true", "ignored", "iou"),
    [
        (row(4), row(8), None, 0.5),  # 4 predicted, 8 true, 4 in both
        # Ground truth 0..7, predicted 0..3, and ignored 4..9: 4 / 4; or ignored 0..1 only: 2 / 6.
        (row(4), row(8), ~row(4), 1.0),
        (row(4), row(8), row(2), 2 / 6),
        (row(0), row(0), None, 1.0),
        (row(1), row(0), None, 0.0),
    ],
)
def test_final_iou_is_intersection_over_union_outside_what_is_ignored(final, true, ignored, iou):
    assert rewards.final_iou(trajectory(final=final), sample(true, ignored)) == pytest.approx(iou)


def test_a_mask_that_was_kept_of_an_absent_target_gains_nothing_and_loses_all():
    kept, absent = trajectory(masks=[row(1)], final=row(1)), sample(row(0))
    assert (rewards.iou_gain(kept, absent), rewards.overshoot(kept, absent)) == (0.0, 1.0)


def test_silence_is_no_answer_to_an_absent_target():
    absent, reward = sample(row(0)), make_reward(DEFAULT_REWARD)
    said = trajectory([turn(Finish(None))])
    masked = trajectory([turn(BOX), turn(Finish(1))], masks=[row(3)], final=row(3))
    # 1 x 1 + 0.5 x 0 + 0.2 x 1; 1 x 0 + 0.5 x (0.1 - 0.02 - 1) + 0.2 x 1
    assert reward(said, absent).total == pytest.approx(1.2)
    assert reward(masked, absent).total == pytest.approx(-0.26)
    for status in (Status.INVALID, Status.MAX_TURNS, Status.MAX_CONTEXT, Status.REPEATED):
        silent = trajectory([turn(None, ERROR)], status=status)
        assert rewards.final_iou(silent, absent) == 0.0
        assert reward(silent, absent).total == pytest.approx(-0.5)  # it had the right mask, and did not say so
        assert rewards.final_iou(dataclasses.replace(silent, final_mask=row(3)), sample(row(3))) == 1.0


def test_masks_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"bool\[1, 10\]"):
        rewards.final_iou(trajectory(final=row(4, size=9)), sample(row(8)))


def test_iou_gain_does_not_pay_for_a_detour():
    # IoU 0.5, 0.2, 0.5, 0.8 with 10 true pixels. Against the best so far: 0.5 + 0 + 0 + 0.3 = 0.8.
    # Against the turn before it would be 0.5 + 0 + 0.3 + 0.3 = 1.1.
    t = trajectory(masks=[row(5), row(2), row(5), row(8)], final=row(2))
    assert rewards.iou_gain(t, sample(row(10))) == pytest.approx(0.8)
    assert rewards.overshoot(t, sample(row(10))) == pytest.approx(0.8 - 0.2)


@given(st.lists(st.integers(0, 10), max_size=8), st.integers(1, 10), st.data())
@settings(max_examples=50, deadline=None)
def test_iou_gain_is_the_sum_in_its_docstring_and_telescopes(lengths, true, data):
    masks = [row(n) for n in lengths]
    final = data.draw(st.sampled_from(masks)) if masks else row(0)
    t, s = trajectory(masks=masks, final=final), sample(row(true))
    best, gain = 0.0, 0.0
    for n in lengths:
        iou = min(n, true) / max(n, true)
        gain, best = gain + max(0.0, iou - best), max(best, iou)
    assert rewards.iou_gain(t, s) == pytest.approx(gain)
    assert rewards.iou_gain(t, s) - rewards.overshoot(t, s) == pytest.approx(rewards.final_iou(t, s))


def test_call_cost_counts_refused_calls_but_neither_finish_nor_malformed_turns():
    turns = [turn(BOX), turn(Zoom((0, 0, 1, 1)), error=ERROR), turn(None, error=ERROR), turn(Finish(1))]
    assert rewards.call_cost(trajectory(turns), sample(row(8))) == 2.0


@pytest.mark.parametrize(
    ("turns", "share"),
    [
        ([], 0.0),
        ([turn(Finish(None))], 0.0),
        ([turn(BOX), turn(Finish(1))], 1.0),
        ([turn(BOX), turn(BOX, repeated=True), turn(Finish(1))], 1 / 2),
        # A, B, A, B: the environment only marks the same action as the turn before; half of the four are old.
        ([turn(BOX), turn(Segment(points=((1, 1),), labels=(1,)))] * 2, 1 / 2),
        # The same box in another view is another action.
        ([turn(BOX), turn(Zoom((0, 0, 4, 4))), turn(BOX)], 1.0),
        # Zoom, reset, zoom, reset. New: zoom, and the first reset (of the zoomed view). Old: the other two.
        ([turn(Zoom((0, 0, 4, 4))), turn(ResetView())] * 2, 1 / 2),
        # Two quarter turns are two different views.
        ([turn(Rotate(1)), turn(Rotate(1))], 1.0),
        # Malformed and refused turns are not effective; a refused zoom does not change the view.
        ([turn(BOX), turn(None, ERROR), turn(Zoom((0, 0, 0, 0)), ERROR), turn(BOX)], 1 / 2),
    ],
)
def test_novel_action(turns, share):
    assert rewards.novel_action(trajectory(turns), sample(row(8))) == share


def test_point_excess_is_per_call():
    calls = [turn(Segment(points=((1.0, 1.0),) * n, labels=(1,) * n)) for n in (6, 3, 5)]
    # Budget 4: 2 + 0 + 1. Budget 2: 4 + 1 + 3.
    assert rewards.point_excess(trajectory([*calls, turn(Finish(1))]), sample(row(8))) == 3.0
    assert rewards.point_excess(trajectory(calls), sample(row(8)), budget=2) == 8.0


@pytest.mark.parametrize(("tokens", "share"), [(0, 0.0), (80, 0.0), (90, 0.5), (99, 0.95), (100, 1.0), (130, 1.0)])
def test_overlong_is_the_soft_punishment_of_dapo(tokens, share):
    # L_max 100, L_cache 20: 0 up to 80, then ((100 - 20) - n) / 20 down to -1, as weight -1 has it; beyond -1.
    t = dataclasses.replace(trajectory([turn(BOX)]), tokens=np.zeros(tokens))
    assert rewards.overlong(t, sample(row(8)), limit=100, window=20) == pytest.approx(share)
    cut = dataclasses.replace(t, status=Status.MAX_CONTEXT)  # by a budget that leaves room for a turn's end
    assert rewards.overlong(cut, sample(row(8)), limit=100, window=20) == 1.0
    assert rewards.overlong(t, sample(row(8)), limit=100, window=0) == float(tokens > 100)


def test_many_turns_by_hand():
    # Limit 8, window 2: 6 turns 0, 7 a half, 8 one.
    counts = [rewards.many_turns(trajectory([turn(BOX)] * n), sample(row(8))) for n in (1, 6, 7, 8)]
    assert counts == [0.0, 0.0, 0.5, 1.0]


@pytest.mark.parametrize("status", [s for s in Status if s is not Status.ENV_FAILED])
def test_format_needs_a_proper_ending(status):
    turns = [turn(BOX), turn(None, ERROR), turn(BOX, ERROR), turn(Finish(1))]
    # A refused call is well-formed: 3 of 4.
    share = 0.75 if status == "finished" else 0.0
    assert rewards.format_ok(trajectory(turns, status=status), sample(row(8))) == share


def test_default_reward_by_hand():
    # 10 true pixels; IoU 0.5, 0.9, then 0.8 committed. Calls: 3 segments (one with 6 points), 1 zoom, finish.
    points = Segment(points=((1.0, 1.0),) * 6, labels=(1,) * 6)
    turns = [turn(BOX), turn(points), turn(Zoom((0, 0, 4, 4))), turn(BOX), turn(Finish(3))]
    t = trajectory(turns, [row(5), row(9), row(8)], row(8))
    reward = make_reward(DEFAULT_REWARD)(t, sample(row(10)))
    # process = 0.9 - 0.02 * 4 + 0.1 * 4/4 - 0.02 * (6 - 4) - (0.9 - 0.8) = 0.78
    expected = {
        "final/final_iou": 0.8,
        "final": 0.8,
        "process/iou_gain": 0.9,
        "process/call_cost": 4.0,
        "process/novel_action": 1.0,
        "process/point_excess": 2.0,
        "process/overshoot": 0.1,
        "process": 0.78,
        "format/format_ok": 1.0,
        "format": 1.0,
    }
    assert reward.parts == pytest.approx(expected)
    # 1.0 * 0.8 + 0.5 * 0.78 + 0.2 * 1.0
    assert reward.total == pytest.approx(1.39)


def one_term(function, weight=1.0, clip=(), **arguments):
    return (RewardGroup("own", 2.0, (RewardTerm(function, weight, tuple(arguments.items())),), clip),)


@pytest.mark.parametrize(
    ("weight", "clip", "value"),
    [(1.0, None, 3.0), (-1.0, None, -3.0), (1.0, (-1.0, 1.0), 1.0), (-1.0, (-1.0, 1.0), -1.0), (0.1, (-1.0, 1.0), 0.3)],
)
def test_own_term_weight_and_clip(own, weight, clip, value):
    groups = one_term(f"{own}:constant", weight, clip, value=np.float32(3))
    reward = make_reward(groups)(trajectory(), sample(row(8)))
    # The part is logged unweighted; the group's weight of 2 comes after the clip.
    assert reward.parts == pytest.approx({"own/constant": 3.0, "own": value})
    assert reward.total == pytest.approx(2.0 * value)
    assert type(reward.total) is float and all(type(part) is float for part in reward.parts.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300, True, np.True_, None, "0.5", "array"])
def test_a_term_that_is_no_reward_is_named_with_what_it_returned(own, value):
    name, arguments = ("array_term", {}) if value == "array" else ("constant", {"value": value})
    reward = make_reward(one_term(f"{own}:{name}", **arguments))
    returned = "array([0., 0.," if value == "array" else repr(value)
    message = refused(".", reward, trajectory(), sample(row(8)))
    assert f"reward term own/{name} ({own}:{name}) returned {returned}" in message
    assert "for sample s" in message and "between -1000000 and 1000000" in message
    assert len(message) < 220 + 2 * len(str(own))


def test_a_term_that_raises_is_named_with_the_sample_and_the_line(own):
    message = refused(".", make_reward(one_term(f"{own}:divides")), trajectory(), sample(row(8)))
    line = OWN.splitlines().index("    return 1 / nothing") + 1
    assert message == (
        f"reward term own/divides ({own}:divides) raised ZeroDivisionError for sample s:"
        f" {own}, line {line}: division by zero"
    )


@pytest.mark.parametrize("function", ["writes_mask", "writes_record"])
def test_a_term_cannot_write_into_what_it_is_given(own, function):
    t, s = trajectory(masks=[row(2)], final=row(2)), sample(row(8))
    groups = (RewardGroup("own", 1.0, (RewardTerm(f"{own}:{function}"), *DEFAULT_REWARD[0].terms)),)
    refused(f"{function}.*read-only", make_reward(groups), t, s)
    assert s.gt_mask.sum() == 8 and t.masks[0].mask.sum() == 2
    assert s.gt_mask.flags.writeable and t.final_mask.flags.writeable  # the caller's own are as they were
    assert np.shares_memory(read_only(s).gt_mask, s.gt_mask) and read_only(s).id == "s"  # and not copied
    assert read_only(s).image is s.image  # with its hash


def test_arguments_of_the_config_reach_the_term(own):
    terms = (
        RewardTerm(f"{own}:scaled", 1.0, (("by", 2),), name="small"),
        RewardTerm(f"{own}:scaled", 10.0, (("by", 2), ("words", ("a", "b"))), name="large"),
    )
    reward = make_reward((RewardGroup("own", 1.0, terms),))(trajectory(), sample(row(8)))
    # two of one function are told apart by their names in the config: 2 + 10 * 2 * 3
    assert reward.parts == {"own/small": 2.0, "own/large": 6.0, "own": 62.0}


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("scaled", (), "missing a required argument: 'by'"),
        ("scaled", (("by", 1), ("to", 2)), "called with (trajectory, sample, by=1, to=2): got an unexpected keyword"),
        ("positional", (), "takes (trajectory), but is called with (trajectory, sample)"),
    ],
)
def test_a_term_that_cannot_be_called_so_is_refused_before_the_first_rollout(own, function, arguments, message):
    refused(re.escape(message), make_reward, one_term(f"{own}:{function}", **dict(arguments)))


def test_env_failed_and_foreign_samples_have_no_reward():
    reward = make_reward(DEFAULT_REWARD)
    with pytest.raises(ValueError, match="env_failed"):
        reward(trajectory(status=Status.ENV_FAILED), sample(row(8)))
    with pytest.raises(ValueError, match="against sample other"):
        reward(trajectory(), dataclasses.replace(sample(row(8)), id="other"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("rsagent_jax.rewards.final_iou", "not of the form module:function"),
        ("rsagent_jax.rewards:", "not of the form"),
        ("rsagent_jax.reward:final_iou", "no module named 'rsagent_jax.reward'; did you mean 'rsagent_jax.rewards'"),
        ("rsagent_jx.rewards:final_iou", "no module named 'rsagent_jx'; did you mean 'rsagent_jax'"),
        ("rsagent_jax.rewards.x:final_iou", "no module named 'rsagent_jax.rewards.x'"),
        ("rsagent_jax.rewards:final_iuo", "has no 'final_iuo'; did you mean 'final_iou'"),
        ("rsagent_jax.config.schema:DEFAULT_REWARD", "is a tuple, not a function"),
        ("configs/quikstart.py:get_config", "file configs/quikstart.py does not exist; did you mean 'configs/quickst"),
        ("configs/quickstart.py:get_confg", "configs/quickstart.py has no 'get_confg'; did you mean 'get_config'"),
        ("nowhere.py:f", "file nowhere.py does not exist (looked for from "),
    ],
)
def test_resolve_names_the_closest_match(path, message):
    refused(re.escape(message), import_path, path)


def test_resolve_returns_the_function_of_a_module_and_of_a_file(own, monkeypatch):
    assert import_path("rsagent_jax.rewards:final_iou") is rewards.final_iou
    monkeypatch.chdir(own.parent)
    (own.parent / "beside_it.py").write_text("VALUE = 7\n")
    (own.parent / "json.py").write_text("from beside_it import VALUE\ndef f(): return VALUE\n")
    assert import_path("my_rewards.py:constant") is import_path(f"{own}:constant")
    monkeypatch.syspath_prepend(own.parent)
    assert import_path("my_rewards:constant")(None, None) == 3  # as a module beside train.py
    assert import_path("json.py:f")() == 7 and json.loads("1") == 1  # a file may have the name of a module
    assert pickle.loads(pickle.dumps(named := import_path("my_rewards.py:constant"))) is named


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import a_module_that_is_not_there\n", "line 1: ModuleNotFoundError: No module named 'a_module_that_is"),
        ("x = 1\ndef f(:\n", "line 2: SyntaxError"),
        ("def g(): return 1 / 0\n\n\ng()\n", "line 1: ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit('bye')\n", "line 2: SystemExit: bye"),
    ],
)
@pytest.mark.parametrize("by_path", [True, False])
def test_an_error_inside_the_users_module_is_one_message_with_its_line(tmp_path, monkeypatch, text, said, by_path):
    file = tmp_path / "broken_reward_module.py"
    file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    said = re.escape(f"broken_reward_module.py, {said}")
    refused(said, import_path, f"{file}:f" if by_path else "broken_reward_module:f")
