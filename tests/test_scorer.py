"""Terms of a whole group, terms that wait, a judge over HTTP: values by hand, and everything that can go wrong."""

import re
import sys

import pytest

from rsagent_jax.collecting.judge import read_score
from rsagent_jax.config.reward import DEFAULT_REWARD, RewardGroup, RewardTerm
from rsagent_jax.rewards import RewardError, make_scorer
from rsagent_jax.types import Reward
from tests.collecting.test_endpoint import Server, good
from tests.evals.test_metrics import row, sample
from tests.refusals import refused
from tests.test_rewards import make_reward, trajectory

OWN = """import asyncio, time

def rank(trajectories, sample):
    sizes = [int(t.final_mask.sum()) for t in trajectories]
    return [float(sorted(sizes).index(size)) for size in sizes]
def one_short(trajectories, sample): return [0.0] * (len(trajectories) - 1)
def no_list(trajectories, sample): return 0.5
def one_nan(trajectories, sample): return [float("nan"), *[1.0] * (len(trajectories) - 1)]
def raises(trajectories, sample): raise KeyError("nothing")
def writes(trajectories, sample): trajectories[0].final_mask[:] = True

asked, gave_way = [], []
async def waits_for_ten(trajectory, sample):
    asked.append(1)
    while len(asked) < 10:
        await asyncio.sleep(0.01)
    return float(trajectory.final_mask.sum())
async def slow(trajectory, sample, seconds=0.2):
    await asyncio.sleep(seconds)
    return float(trajectory.final_mask.sum())
async def slow_rank(trajectories, sample):
    await asyncio.sleep(0.01)
    return rank(trajectories, sample)
async def hangs_on_large(trajectory, sample):
    await asyncio.sleep(0 if trajectory.final_mask.sum() < 4 else 60)
    return 1.0
async def never_gives_way(trajectory, sample):
    time.sleep(5)
    gave_way.append(1)
    return 1.0
async def times_out_itself(trajectory, sample): raise TimeoutError("the server's own")
async def boolean(trajectory, sample): return True
def by_half(trajectory, sample): return 0.5
"""


@pytest.fixture
def own(tmp_path, imports_restored):
    path = tmp_path / "my_terms.py"
    path.write_text(OWN)
    return path


def group_of(*terms: RewardTerm) -> tuple[RewardGroup, ...]:
    return (RewardGroup("own", 2.0, terms),)


def scored(groups, *sizes: tuple[int, ...]) -> list[Reward | RewardError]:
    """Of one sample for each of `sizes`, with a trajectory for each final mask of that many pixels."""
    return make_scorer(groups)([[trajectory(final=row(n)) for n in of] for of in sizes], [sample(row(8))] * len(sizes))


def totals(found) -> list[float]:
    assert not [e for e in found if isinstance(e, RewardError)]
    return [reward.total for reward in found]


@pytest.mark.parametrize("function", ["rank", "slow_rank"])
def test_a_term_of_a_group_sees_all_of_a_sample_and_gives_one_value_each(own, function):
    terms = RewardTerm(f"{own}:{function}", 0.5, scope="group"), RewardTerm(f"{own}:by_half")
    # ranks 2, 0, 1 and then 0; samples whose trajectories were all lost have none. 2 * (0.5 * rank + 0.5)
    found = scored(group_of(*terms), (6, 1, 3), (), (5,))
    assert totals(found) == [3.0, 1.0, 2.0, 1.0]
    assert found[0].parts == {f"own/{function}": 2.0, "own/by_half": 0.5, "own": 1.5}


def test_the_scorer_is_the_sum_that_one_trajectory_alone_gets():
    one, many = make_reward(DEFAULT_REWARD), scored(DEFAULT_REWARD, (2, 8), (4,))
    assert many == [one(trajectory(final=row(n)), sample(row(8))) for n in (2, 8, 4)]


def message(groups, *sizes) -> str:
    """The error that all trajectories have."""
    (text,) = {str(error) for error in scored(groups, *sizes) if isinstance(error, RewardError)}
    return text


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("one_short", "returned 2 values for the 3 trajectories of sample s; one each"),
        ("no_list", "returned 0.5 for the 3 trajectories of sample s; one each"),
        ("raises", r"raised KeyError for sample s: .*my_terms.py, line \d+: 'nothing'"),
        ("writes", "raised ValueError for sample s: .*read-only"),
    ],
)
def test_what_a_term_of_a_group_may_not_do(own, function, says):
    groups = group_of(RewardTerm(f"{own}:{function}", scope="group"))
    assert re.search(rf"reward term own/{function} \(.*\) {says}", message(groups, (1, 2, 3)))
    assert all(isinstance(error, RewardError) for error in scored(groups, (1, 2, 3)))


def test_one_bad_value_of_a_group_is_that_trajectorys_alone(own):
    first, *rest = scored(group_of(RewardTerm(f"{own}:one_nan", scope="group")), (1, 2, 3))
    assert "returned nan for sample s" in str(first) and totals(rest) == [2.0, 2.0]


def test_async_terms_run_side_by_side(own):
    groups = group_of(*(RewardTerm(f"{own}:waits_for_ten", name=name) for name in "ab"))
    assert totals(scored(groups, (1, 2, 3), (4, 5))) == [4.0, 8.0, 12.0, 16.0, 20.0]


def test_one_that_hangs_is_late_and_the_others_have_their_values(own):
    groups = group_of(RewardTerm(f"{own}:hangs_on_large", deadline_s=0.2))
    small, large = scored(groups, (2, 6))
    assert small.total == 2.0
    assert str(large).endswith("gave no value for sample s within 0.2 s, its deadline_s")


def test_one_that_never_gives_way_holds_nobody_up_and_the_next_step_is_asked_anew(own, monkeypatch):
    monkeypatch.setattr("rsagent_jax.rewards.LATE_S", 0.1)
    terms = RewardTerm(f"{own}:never_gives_way", deadline_s=0.1), RewardTerm(f"{own}:slow", deadline_s=0.1)
    (error,) = make_scorer(group_of(*terms))([[trajectory(final=row(2))]], [sample(row(8))])
    assert "never_gives_way" in str(error) and not sys.modules["my_terms"].gave_way
    quick = make_scorer(group_of(RewardTerm(f"{own}:slow", arguments=(("seconds", 0.01),))))
    assert totals(quick([[trajectory(final=row(2))]], [sample(row(8))])) == [4.0]


def test_what_an_async_term_raises_or_returns_is_named_as_of_any_other(own):
    says = r"raised TimeoutError for sample s: .*my_terms.py, line \d+: the server's own"
    assert re.search(says, message(group_of(RewardTerm(f"{own}:times_out_itself")), (1,)))
    assert "returned True for sample s; it must be a float" in message(group_of(RewardTerm(f"{own}:boolean")), (1,))


# --- A judge over HTTP ---


def judge_of(server, deadline_s=5.0, **arguments) -> tuple[RewardGroup, ...]:
    given = dict(url=server.url, model="m", retries=2, backoff_s=0.01) | arguments
    term = RewardTerm("rsagent_jax.collecting.judge:judge_mask", 0.5, tuple(given.items()), deadline_s=deadline_s)
    return group_of(term)


def test_a_judge_is_shown_both_pictures_and_the_question_but_never_the_truth():
    with Server([good("It covers it but for the rim. SCORE: 8")]) as server:
        assert totals(scored(judge_of(server), (3, 5))) == [0.8, 0.8]  # 2 * 0.5 * 0.8
        (asked,) = server.asked[0]["messages"]
        kinds = [part["type"] for part in asked["content"]]
        assert kinds == ["image_url", "image_url", "text"] and server.asked[0]["temperature"] == 0.0
        plain, shown = (part["image_url"]["url"] for part in asked["content"][:2])
        others = {request["messages"][0]["content"][1]["image_url"]["url"] for request in server.asked}
        assert plain != shown and len(others) == len(server.asked) == 2  # another mask, another picture
        assert f"Asked for: {sample(row(8)).query}" in asked["content"][2]["text"]


def test_a_judge_is_asked_again_and_an_answer_without_a_score_is_named():
    with Server([(500, {}, "{}"), good("SCORE: 10")]) as server:
        assert totals(scored(judge_of(server), (3,))) == [1.0]
    with Server([good("I cannot say.")]) as server:
        text = message(judge_of(server), (3,))
        assert "raised ValueError for sample s" in text and "I cannot say." in text
    with Server([(500, {}, "{}")]) as server:
        assert "raised PolicyFailure for sample s" in message(judge_of(server), (3,))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(dict(timout_s=3.0), "timout_s.*timeout_s"), (dict(retries=-1), "retries"), (dict(url=""), "url and .*model are")],
)
def test_a_judges_arguments_are_looked_at_before_a_step(arguments, says):
    given = dict(url="http://h/v1", model="m", size=64) | arguments
    groups = group_of(RewardTerm("rsagent_jax.collecting.judge:judge_mask", 0.5, tuple(given.items())))
    refused(rf"reward term own/judge_mask \(.*\): .*{says}", make_scorer, groups)


def test_a_judge_that_hangs_is_a_deadline():
    with Server([lambda body: (200, {"sleep": "3"}, good("SCORE: 1")[2])]) as server:
        assert "gave no value for sample s within 0.3 s" in message(judge_of(server, deadline_s=0.3), (1, 2))


def test_scores():
    assert [read_score(text) for text in ("SCORE: 7", "score: 3 or rather **SCORE:** 9.5")] == [0.7, 0.95]
    for text in ("", "7", "SCORE: 11", "SCORE: high"):
        with pytest.raises(ValueError, match="no `SCORE: n` from 0 to 10"):
            read_score(text)
