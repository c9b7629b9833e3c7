"""Which prompts are drawn: none twice in an epoch, solved ones less often, the same after a resume."""

import collections
import json

import pytest

from rsagent_jax.data.pipeline import Pipeline
from rsagent_jax.runtime.processes import Share
from rsagent_jax.train import prompts
from rsagent_jax.train.prompts import Prompts
from rsagent_jax.types import DataError


class Numbers(list):
    """Samples that are their own ids."""

    @property
    def ids(self):
        return list(map(str, self))


def source(n: int = 7, curriculum: float = 0.0, share=None, **config) -> Prompts:
    how = dict(seed=0, threads=2, ahead=2, share=share or Share())
    return Prompts(Pipeline(Numbers(range(n)), **how, **config), curriculum)


@pytest.mark.parametrize("curriculum", [0.0, 0.5])
def test_no_prompt_is_drawn_twice_in_an_epoch_whatever_the_steps_are(curriculum):
    """Seven samples in steps of 3, 1, 2, …, as a refilled step draws them; nothing has been learnt of them yet."""
    s = source(curriculum=curriculum)
    seen = [sample for n in (3, 1, 2, 3, 3, 1, 3, 3, 2) for _, sample in s.draw(n)]
    assert len(seen) == 21
    for epoch in range(3):
        assert sorted(seen[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert seen == [sample for _, sample in source().draw(21)]  # the order of a run without a curriculum


def test_processes_share_what_is_drawn_and_pass_over_the_same(monkeypatch):
    whole = source(curriculum=0.9)
    halves = [source(curriculum=0.9, share=Share(i, 2)) for i in (0, 1)]
    success = {str(i): 1.0 for i in range(0, 7, 2)}
    whole.learn(success)
    for half in halves:  # each of them knows of half; they tell each other
        parts = [{k: v for k, v in success.items() if int(k) % 4 == rest} for rest in (0, 2)]
        monkeypatch.setattr(prompts, "exchange", lambda own, parts=parts: parts)
        half.learn(parts[0])
    for _ in range(4):
        drawn = whole.draw(4)
        assert sorted(halves[0].draw(4) + halves[1].draw(4)) == drawn
    assert whole.state() == halves[0].state() == halves[1].state()


def test_a_sample_is_passed_over_by_how_well_its_last_group_did():
    """1 - 0.8 * success: 0.2 of those at 1.0, 0.6 of those at 0.5, all of those at 0, over 400 epochs."""
    s = source(3, curriculum=0.8)
    s.learn({"0": 1.0, "1": 0.5, "2": 0.25})
    s.learn({"2": 0.0})  # the last group counts
    drawn = collections.Counter()
    while s.pipeline.position < 3 * 400:
        drawn.update(sample for _, sample in s.draw(1))
    assert drawn[2] in (400, 401) and s.passed_over == s.pipeline.position - drawn.total()
    assert drawn[0] / 400 == pytest.approx(0.2, abs=0.06) and drawn[1] / 400 == pytest.approx(0.6, abs=0.08)


def test_what_was_learnt_comes_back_with_the_position():
    def play(s: Prompts, steps: int) -> list[int]:
        seen = []
        for _ in range(steps):
            drawn = [sample for _, sample in s.draw(2)]
            s.learn({str(sample): sample / 7 for sample in drawn})
            seen += drawn
        return seen

    whole, first = source(curriculum=0.9), source(curriculum=0.9)
    seen = play(whole, 12)
    assert play(first, 5) == seen[:10]
    state = first.state()
    assert set(state) == {"position", "skipped", "success", "passed_over"}
    again = source(curriculum=0.9)
    again.restore(json.loads(json.dumps(state)))
    assert play(again, 7) == seen[10:] and again.state() == whole.state()
    off = source()
    assert off.state() == {"position": 0, "skipped": 0}
    off.restore(state)  # of a run that had one
    assert off.pipeline.position == state["position"]


def test_what_cannot_be_read_is_counted_there_as_well():
    class Half(Numbers):
        def __getitem__(self, i):
            if i % 2:
                raise DataError("gone")
            return i

    s = Prompts(Pipeline(Half(range(6)), seed=0, threads=2), 0.5)
    drawn = s.draw(6)
    assert sorted(sample for _, sample in drawn) == [0, 2, 4] and s.state()["skipped"] == 3
