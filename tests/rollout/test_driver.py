"""The driver with a script for a policy and a disc for a segmenter: endings, order, and every token of the context."""

import dataclasses
import re
import threading
import weakref

import numpy as np
import pytest
from agent_fakes import LIMITS, DiscSegmenter, same_states
from hypothesis import given, settings
from hypothesis import strategies as st

from rsagent_jax.agent import environment, prompts
from rsagent_jax.agent.replay import replay, state_to_json
from rsagent_jax.data.processor import Processor
from rsagent_jax.models.qwen25_vl.positions import merged_tokens, mrope_positions
from rsagent_jax.rollout.driver import Driver
from rsagent_jax.rollout.policy import TextPolicy
from rsagent_jax.types import Status
from sam_bridge.types import FailureKind
from tests.refusals import refused
from tests.rollout import small
from tests.rollout.small import AGENT, THREE_IMAGES, SlowSegmenter, click, finish, scripted, task, zoom

BAD = "no call at all"


class Policy(TextPolicy):
    """TextPolicy with room that a test sets, turns cut after `cut` tokens, and a log of who played together."""

    def __init__(self, scripts, *, cut=None, **room):
        super().__init__(scripted(scripts), small.processor())
        self.cut, self.together = cut, []
        for name, value in room.items():
            setattr(self, name, value)

    def step(self):
        self.together.append(sorted(request.task.uid for request, _ in self.turns.values()))
        return super().step()

    def _complete(self, text, budget):
        return super()._complete(text, min(budget, self.cut or budget))


def tokens_of(text):
    return len(small.processor().encode(text))


FINISH = max(tokens_of(finish(9)), tokens_of(finish(None))) + 1  # what is kept back for it, and the terminator


def announcement(mask_id, agent):
    return " " + prompts.last_turn_text(mask_id, "brief") if agent.announce_last else ""


def seen(trajectory):
    return [turn.observation for turn in trajectory.turns if turn.observation is not None]


def play(scripts, tasks, *, segmenter=None, agent=AGENT, workers=2, **policy):
    driver = Driver(Policy(scripts, **policy), segmenter or DiscSegmenter(), small.processor(), agent, workers=workers)
    return driver.run(tasks)


def one(*turns, **options):
    ((trajectory, state),) = play({"s0": turns}, [task(0)], **options)
    return trajectory, state


def pieces(trajectory, cut=None):
    """The context written out by hand: (text, images, sampled?) of each part that is encoded on its own."""
    sample = small.sample(0)
    start = environment.reset(sample.image, sample.query, AGENT, small.processor().images.limits)
    first = environment.opening_observation(start)
    parts = [(prompts.opening(prompts.system_prompt("brief"), first.text), [first.image], False)]
    for i, turn in enumerate(trajectory.turns):
        cut_here = cut is not None and len(small.processor().encode(turn.text)) >= cut
        parts.append((turn.text + ("" if cut_here else "<|im_end|>"), [], True))
        if turn.observation is not None and i + 1 < len(trajectory.turns):
            image = turn.observation.image
            text = prompts.observation_turn(turn.observation.text, image is not None)
            parts.append(("<|im_end|>" * cut_here + text, [] if image is None else [image], False))
    return parts


def expected(parts):
    """tokens, sampled, patches, grids when each part is encoded alone and its image placeholder widened."""
    p, tokens, sampled, patches, grids = small.processor(), [], [], [], []
    for text, images, is_sampled in parts:
        prompt, _ = p.prompt(text, images)
        ids = p.encode(text)
        wide = [[i] * (merged_tokens(prompt.grids[0]) if i == p.image_id else 1) for i in ids]
        tokens += [t for group in wide for t in group]
        sampled += [is_sampled] * sum(map(len, wide))
        patches.append(prompt.patches)
        grids += prompt.grids
    return np.array(tokens, np.int32), np.array(sampled), np.concatenate(patches), tuple(grids)


def check_positions(trajectory):
    positions, _ = mrope_positions(trajectory.tokens, trajectory.grids, small.processor().image_id)
    np.testing.assert_array_equal(trajectory.positions, positions)


def check_context(trajectory, parts):
    tokens, sampled, patches, grids = expected(parts)
    np.testing.assert_array_equal(trajectory.tokens, tokens)
    np.testing.assert_array_equal(trajectory.loss_mask, sampled)
    np.testing.assert_array_equal(trajectory.patches, patches)
    assert trajectory.grids == grids
    check_positions(trajectory)
    small.assert_as_declared(trajectory)


def test_the_context_is_the_pieces_encoded_one_by_one_with_exactly_the_turns_marked_as_sampled():
    trajectory, state = one(*THREE_IMAGES)
    assert trajectory.status is Status.FINISHED and state.status is Status.FINISHED
    assert len(trajectory.grids) == 4 and len(trajectory.turns) == 4
    check_context(trajectory, pieces(trajectory))
    terminators = trajectory.tokens == small.processor().terminator_id
    # four turns end with a sampled terminator; system, user and three observations with a forced one
    assert [int((terminators & mark).sum()) for mark in (trajectory.loss_mask, ~trajectory.loss_mask)] == [4, 5]
    assert (trajectory.logprobs[~trajectory.loss_mask] == 0).all()


def test_a_turn_that_the_budget_cut_is_closed_by_a_forced_terminator():
    long = click(30, 40)[:-1] + " "  # not one whole call
    cut = 12
    trajectory, _ = one(long, long, finish(None), cut=cut)
    assert [t.error is not None for t in trajectory.turns] == [True, True, True]
    assert trajectory.status is Status.INVALID
    parts = pieces(trajectory, cut)
    # the cut turns decode to text that may encode differently: compare with the ids themselves
    ids = small.processor().encode(long)[:cut]
    turns = np.split(trajectory.tokens[trajectory.loss_mask], [cut, 2 * cut])
    np.testing.assert_array_equal(turns[0], ids)
    np.testing.assert_array_equal(turns[1], ids)
    starts = np.flatnonzero(np.diff(trajectory.loss_mask.astype(int)) == -1) + 1
    assert (trajectory.tokens[starts] == small.processor().terminator_id).all() and len(starts) == 2
    check_positions(trajectory)
    forced = np.concatenate([expected([p])[0] for p in parts if not p[2]])
    np.testing.assert_array_equal(trajectory.tokens[~trajectory.loss_mask], forced)


def test_another_end_of_a_turn_is_no_text_and_is_closed_by_a_forced_terminator():
    """generation_config.json of Qwen2.5-VL also names <|endoftext|>; the turn before it counts as any other."""
    small_one = small.processor()
    other_end = small_one.tokenizer.token_to_id("<|endoftext|>")
    processor = Processor(small_one.tokenizer, small_one.images, small_one.config, (small_one.terminator_id, other_end))

    class Ending(Policy):
        def _complete(self, text, budget):
            whole = super()._complete(text, budget)
            tokens = np.append(whole.tokens[:-1], other_end).astype(np.int32)
            return dataclasses.replace(whole, tokens=tokens, finished=False)

    driver = Driver(Ending({"s0": THREE_IMAGES}), DiscSegmenter(), processor, AGENT)
    ((trajectory, _),) = driver.run([task(0)])
    usual, _ = one(*THREE_IMAGES)
    assert trajectory.status is Status.FINISHED
    assert [t.text for t in trajectory.turns] == [t.text for t in usual.turns] == list(THREE_IMAGES)
    np.testing.assert_array_equal(trajectory.final_mask, usual.final_mask)
    # The usual context, with the other end before each terminator that ends a turn; only the ends are sampled.
    ends = np.flatnonzero(usual.loss_mask & (usual.tokens == small_one.terminator_id))
    wanted = np.insert(usual.tokens, ends, other_end)[:-1]  # the last turn is followed by nothing
    np.testing.assert_array_equal(trajectory.tokens, wanted)
    sampled = np.insert(usual.loss_mask, ends, True)[:-1]
    sampled[np.flatnonzero(wanted == other_end)[:-1] + 1] = False
    np.testing.assert_array_equal(trajectory.loss_mask, sampled)
    check_positions(trajectory)


@pytest.mark.parametrize(
    ("turns", "agent", "status", "final_id"),
    [
        ((click(30, 40), finish(1)), {}, Status.FINISHED, 1),
        ((click(30, 40), finish(None)), {}, Status.FINISHED, None),
        ((click(30, 40), click(31, 60), click(60, 60)), {"max_turns": 3}, Status.MAX_TURNS, 3),
        ((BAD, click(30, 40), BAD, BAD, BAD), {}, Status.INVALID, 1),
        ((click(30, 40), click(30, 40)), {"max_repeats": 2}, Status.REPEATED, 1),
    ],
)
def test_every_ending_of_the_environment_reaches_the_trajectory(turns, agent, status, final_id):
    trajectory, state = one(*turns, agent=dataclasses.replace(AGENT, **agent))
    assert (trajectory.status, trajectory.final_mask_id) == (status, final_id)
    assert len(trajectory.turns) == len(turns) and trajectory.turns == state.turns
    wanted = np.zeros((112, 112), bool) if final_id is None else state.masks[final_id - 1].mask
    np.testing.assert_array_equal(trajectory.final_mask, wanted)
    assert trajectory.loss_mask[-1]  # nothing is appended after the last turn
    check_context(trajectory, pieces(trajectory))


def test_a_prompt_that_leaves_no_room_for_a_finish_ends_before_the_policy_is_asked():
    only = dataclasses.replace(AGENT, max_turns=1)  # so that the opening says that this is the last turn
    need = len(one(finish(None), agent=only)[0].tokens)  # finish(null) is the longest
    assert need == int(one(finish(None), agent=only)[0].loss_mask.argmax()) + FINISH
    for context, status in ((need, Status.FINISHED), (need - 1, Status.MAX_CONTEXT)):
        trajectory, _ = one(finish(None), context=context)
        assert trajectory.status is status
    assert trajectory.turns == () and len(trajectory.tokens) == 0 and trajectory.positions.shape == (3, 0)
    assert trajectory.patches.shape == (0, 1176) and trajectory.grids == () and not trajectory.final_mask.any()


def test_an_image_with_more_patches_than_a_slot_takes_ends_the_trajectory():
    assert one(finish(None), patches=64)[0].status is Status.FINISHED
    assert one(finish(None), patches=63)[0].status is Status.MAX_CONTEXT


TIGHT = dataclasses.replace(AGENT, typical_turn=30)


def tight(*turns, spare=20, agent=TIGHT, **policy):
    """Two clicks and a finish in a context in which the third turn is the last, with `spare` tokens to choose from."""
    whole, _ = one(click(30, 40), click(50, 40), finish(1), agent=agent)
    start = int(np.flatnonzero(np.diff(whole.loss_mask.astype(int)) == 1)[2]) + 1  # of the third turn
    last = tokens_of(announcement(1, agent))
    return one(*turns, context=start + last + FINISH + spare, agent=agent, max_new_tokens=100, **policy)


def test_the_last_turn_that_fits_is_announced_with_the_best_mask_and_finish_fits():
    trajectory, state = tight(click(30, 40), click(50, 40), finish(1))
    assert trajectory.status is Status.FINISHED and trajectory.final_mask_id == 1
    texts = [turn.observation.text for turn in trajectory.turns[:2]]
    assert [text.endswith(" Last turn: finish, best mask 2.") for text in texts] == [False, True]
    assert [turn.last for turn in trajectory.turns] == [False, False, True]
    check_context(trajectory, pieces(trajectory))
    same_states(state, replay(state_to_json(state), state.image))


def test_a_trajectory_that_does_not_finish_in_its_announced_last_turn_ends_there():
    trajectory, state = tight(click(30, 40), click(50, 40), click(60, 40))
    assert trajectory.status is Status.MAX_CONTEXT and len(trajectory.turns) == 3
    assert trajectory.loss_mask[-1] and len(trajectory.grids) == 3  # the third overlay was never appended
    np.testing.assert_array_equal(trajectory.final_mask, state.masks[2].mask)
    same_states(state, replay(state_to_json(state), state.image))


def test_without_the_announcement_a_trajectory_goes_on_until_not_even_a_finish_fits():
    silent = dataclasses.replace(TIGHT, announce_last=False)
    trajectory, _ = tight(click(30, 40), click(50, 40), finish(1), agent=silent)
    assert trajectory.status is Status.FINISHED and not any("Last" in t.text for t in seen(trajectory))
    trajectory, _ = tight(click(30, 40), click(50, 40), click(60, 40), agent=silent)
    assert trajectory.status is Status.MAX_CONTEXT and len(trajectory.turns) == 3 and not trajectory.turns[2].last


def test_turns_get_the_room_that_is_left_beside_a_mask_and_a_finish():
    turns = click(30, 40), click(50, 40), finish(1)
    starts = np.flatnonzero(np.diff(one(*turns)[0].loss_mask.astype(int)) == 1) + 1
    policy, budgets = Policy({"s0": turns}, max_new_tokens=150), []
    driver = Driver(policy, DiscSegmenter(), small.processor(), TIGHT)
    bounds = driver.budget_of((112, 112))
    reserve = 1 + bounds.mask + bounds.announcement + FINISH
    policy.context = int(starts[1]) + reserve + 60
    driver.budget_of.cache_clear()
    submit = policy.submit
    policy.submit = lambda request: (budgets.append(request.budget), submit(request))
    ((trajectory, _),) = driver.run([task(0)])
    # where the third, announced turn begins
    end = int(np.flatnonzero(np.diff(trajectory.loss_mask.astype(int)) == 1)[2]) + 1
    assert budgets == [min(150, policy.context - int(starts[0]) - reserve), 60, policy.context - end]
    assert budgets[0] > 60 > FINISH and trajectory.turns[2].last


def test_a_view_that_leaves_no_room_for_a_finish_is_refused_and_the_trajectory_goes_on():
    images = dataclasses.replace(small.processor().images, limits=LIMITS)  # views of up to 256 tokens
    processor = Processor(small.processor().tokenizer, images, small.processor().config)
    look, answer = zoom(0, 0, 224, 200), finish(None)

    def run(context):
        policy = Policy({"s0": (look, answer)}, context=context)
        driver = Driver(policy, DiscSegmenter(), processor, TIGHT)
        return *driver.run([task(0, h=224, w=224)])[0], driver.budget_of((224, 224))

    whole, _, bounds = run(1000)
    assert whole.grids == ((1, 16, 16), (1, 14, 16)) and whole.status is Status.FINISHED
    opening = int(whole.loss_mask.argmax())
    context = opening + tokens_of(look) + 1 + bounds.mask + bounds.announcement + FINISH
    for more, reason in ((1, "no_room"), (60, None)):
        trajectory, state, _ = run(context + more)
        first = trajectory.turns[0]
        assert trajectory.status is Status.FINISHED and first.last is False and state.turns[1].last
        assert (first.error and first.error.reason) == reason
        assert len(trajectory.grids) == 1 + (reason is None)
        same_states(state, replay(state_to_json(state), state.image))


@settings(max_examples=40, deadline=None)
@given(st.integers(120, 700), st.lists(st.integers(0, 4), min_size=8, max_size=8), st.integers(FINISH, 120))
def test_whatever_the_context_a_policy_that_finishes_when_told_always_finishes(context, kinds, most):
    """Clicks, zooms and nonsense in any order; `finish` is said in the turn that is announced as the last."""

    def act(task, state):
        if state.last:
            return finish(1 if state.masks else None)
        n = len(state.turns)
        turns = [click(30 + n, 40), zoom(0, 0, 60 + n, 60), BAD, click(99, 40 + n), zoom(9, 9, 90, 90 + n)]
        return turns[kinds[n]]

    policy = Policy({}, context=context, max_new_tokens=most)
    policy.act = act
    agent = dataclasses.replace(TIGHT, max_invalid=9)
    ((t, _),) = Driver(policy, DiscSegmenter(), small.processor(), agent).run([task(0)])
    assert len(t.tokens) <= context
    assert t.status in (Status.FINISHED, Status.REPEATED) or (t.status is Status.MAX_CONTEXT and not t.turns)


def test_a_segmenter_that_dies_in_turn_2_fails_that_trajectory_alone():
    # one worker: calls come in order of the tasks, so the third call is turn 2 of the first task
    segmenter = DiscSegmenter(fail=[None, None, FailureKind.UNAVAILABLE])
    scripts = {f"s{i}": (click(30, 40), click(50, 40), finish(2)) for i in range(2)}
    (broken, state), (fine, _) = play(scripts, [task(0), task(1)], segmenter=segmenter, workers=1)
    assert broken.status is Status.ENV_FAILED and state.failure.kind is FailureKind.UNAVAILABLE
    assert len(broken.turns) == 2 and len(broken.masks) == 1
    assert fine.status is Status.FINISHED and fine.final_mask_id == 2
    assert broken.loss_mask.sum() == 2 * (len(small.processor().encode(click(30, 40))) + 1)


def test_one_slow_tool_changes_nothing_but_the_time():
    shapes = {0: (112, 112), 1: (84, 112), 2: (112, 84)}
    scripts = {f"s{i}": (click(30 + i, 40), click(50, 40 + i), finish(2)) for i in shapes}
    tasks = [task(i, h=h, w=w) for i, (h, w) in shapes.items()]
    slow = SlowSegmenter(0.3, slow_shape=(84, 112))
    fast = play(scripts, tasks)
    slowed = play(scripts, tasks, segmenter=slow, workers=3)
    assert slow.most > 1  # calls of different trajectories run side by side
    for (a, _), (b, _) in zip(fast, slowed, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.patches, b.patches)
        np.testing.assert_array_equal(a.final_mask, b.final_mask)
    assert slowed[1][0].seconds["tool"] > 0.6 > fast[1][0].seconds["tool"]  # two calls


def test_a_slot_that_is_free_takes_the_next_task_and_all_come_back_in_order():
    """Two slots: the second task takes seven turns, the others two each beside it."""
    lengths = [2, 7, 2, 2, 2]
    scripts = {f"s{i}": (*[click(40, 40 + j) for j in range(n - 1)], finish(1)) for i, n in enumerate(lengths)}
    policy, seen = Policy(scripts, slots=2), []
    note = lambda task, state: seen.append((task.uid, len(state.turns)))  # noqa: E731
    driver = Driver(policy, DiscSegmenter(), small.processor(), AGENT, on_turn=note)
    out = driver.run([task(i, uid=10 + i) for i in range(5)])
    assert [(t.sample_id, t.group_id, t.query) for t, _ in out] == [(f"s{i}", i, f"disc number {i}") for i in range(5)]
    assert [len(t.turns) for t, _ in out] == lengths
    turns = [uid for uids in policy.together for uid in uids]
    assert sorted(turns) == sorted(10 + i for i, n in enumerate(lengths) for _ in range(n))
    assert max(map(len, policy.together)) <= 2 and policy.turns == {}
    assert turns.index(12) < len(turns) - 1 - turns[::-1].index(11)  # the third task began before the second ended
    assert sorted(seen) == sorted((10 + i, n + 1) for i in range(5) for n in range(lengths[i]))
    alone = play(scripts, [task(3, uid=13)])[0][0]
    np.testing.assert_array_equal(alone.tokens, out[3][0].tokens)


@pytest.mark.parametrize(
    ("how", "kind", "detail"),
    [
        ("hangs", FailureKind.TIMEOUT, "no answer within 300 s"),
        ("raises", FailureKind.INTERNAL, "RuntimeError: out of cheese"),
        ("nothing", FailureKind.INTERNAL, "NoneType"),
        ("small", FailureKind.INTERNAL, r"mask bool\[3, 3\]"),
    ],
)
def test_a_broken_tool_costs_its_own_trajectory_and_frees_its_slot_and_thread(how, kind, detail, monkeypatch):
    shapes = {0: (112, 112), 1: (84, 112), 2: (112, 84), 3: (84, 112), 4: (112, 112)}
    scripts = {f"s{i}": (click(30 + i, 40), finish(1)) for i in shapes}
    tasks = [task(i, h=h, w=w) for i, (h, w) in shapes.items()]
    segmenter = small.BrokenSegmenter({(84, 112): how})
    segmenter.hung = small.ToolClock(monkeypatch).skip
    # one slot and one thread: whoever does not give them back blocks all the others
    agent = dataclasses.replace(AGENT, tool_deadline_s=300.0)
    out = play(scripts, tasks, segmenter=segmenter, agent=agent, workers=1, slots=1)
    segmenter.woken.set()
    assert [t.status for t, _ in out] == [Status.ENV_FAILED if i in (1, 3) else Status.FINISHED for i in shapes]
    failure = out[1][1].failure
    assert failure.kind is kind and re.search(detail, failure.detail)


def test_a_turn_that_hangs_without_a_tool_is_a_timeout_as_well(monkeypatch):
    clock, woken = small.ToolClock(monkeypatch), threading.Event()
    monkeypatch.setattr(environment, "apply_reply", lambda *_, **__: (clock.skip(), woken.wait(60)))
    t, state = one(BAD, agent=dataclasses.replace(AGENT, tool_deadline_s=300.0))
    woken.set()
    assert t.status is Status.ENV_FAILED and state.failure.kind is FailureKind.TIMEOUT


def test_a_cancelled_trajectory_is_an_ending_and_leaves_the_others_alone():
    scripts = {f"s{i}": (click(30, 40), click(50, 40), finish(2)) for i in range(3)}
    policy = Policy(scripts, slots=2)
    stop = lambda task, state: driver.cancel(task) if task.uid == 1 else None  # noqa: E731
    driver = Driver(policy, DiscSegmenter(), small.processor(), AGENT, on_turn=stop)
    out = driver.run([task(i) for i in range(3)])
    assert [t.status for t, _ in out] == [Status.FINISHED, Status.CANCELLED, Status.FINISHED]
    assert len(out[1][0].turns) == 1 and policy.turns == {}
    np.testing.assert_array_equal(out[0][0].tokens, play(scripts, [task(0)])[0][0].tokens)


def test_a_budget_of_sampled_tokens_keeps_a_finish_back_and_ends_the_trajectory():
    first = tokens_of(click(30, 40)) + 1
    agent = dataclasses.replace(TIGHT, max_tokens=first + FINISH + 5, typical_turn=20)
    t, _ = one(click(30, 40), finish(1), agent=agent)
    assert t.status is Status.FINISHED and t.turns[0].observation.text.endswith("Last turn: finish, best mask 1.")
    t, _ = one(click(30, 40), click(50, 40), finish(1), agent=agent)
    assert t.status is Status.MAX_CONTEXT and t.loss_mask.sum() == first + FINISH + 5  # the second turn was cut


def test_samples_that_are_gone_when_they_have_been_played_keep_their_openings_to_themselves():
    """A stream of samples that nobody else holds: Python gives the id() of one that is gone to the next."""
    act = lambda task, state: finish(None)  # noqa: E731
    driver = Driver(TextPolicy(act, small.processor(), slots=2), DiscSegmenter(), small.processor(), AGENT, workers=2)
    for played, trajectory, _ in driver.play(task(i) for i in range(60)):
        assert f'"{played.sample.query}"' in small.processor().decode(trajectory.tokens)
    assert len(driver.openings) <= 2


def test_views_larger_than_the_weights_accept_are_refused_since_they_would_be_resized_twice():
    for limits in ({"max_pixels": 448 * 448}, {"min_pixels": 28 * 28}):
        refused(next(iter(limits)), one, finish(None), agent=dataclasses.replace(AGENT, **limits))


def test_narrower_limits_make_smaller_views_with_matching_patches():
    trajectory, state = one(zoom(0, 0, 60, 60), finish(None), agent=dataclasses.replace(AGENT, max_pixels=84 * 84))
    assert state.view.size_view == (84, 84)
    assert trajectory.grids == ((1, 6, 6), (1, 6, 6))  # 84 / 14 patches a side


def test_a_driver_that_is_dropped_holds_its_engine_no_longer():
    """Without the garbage collector: weights and cache of two engines may not fit."""
    driver = Driver(TextPolicy(lambda task, state: finish(None), small.processor()), DiscSegmenter(),
                    small.processor(), AGENT)  # fmt: skip
    driver.run([task(1)])
    engine = weakref.ref(driver.policy)
    del driver
    assert engine() is None
