"""Recovery, harm and agreement of thought and act, counted by hand."""

import json

import numpy as np
import pytest

from rsagent_jax.agent.tools import Finish, ResetView, Rotate, Segment, Zoom, render_call
from rsagent_jax.config.schema import MetricConfig
from rsagent_jax.evals.behaviour import behaviour, named_acts, recorded_behaviour, summarize_behaviours
from rsagent_jax.evals.metrics import Counts, pixel_counts
from rsagent_jax.evals.records import Record
from rsagent_jax.types import Sample, Status

CLICK, BOX = Segment(points=((5.0, 5.0),), labels=(1,)), Segment(box=(1.0, 1.0, 9.0, 9.0))


def turns(*said):
    return [render_call(call, thought) for thought, call in said]


def test_a_wrong_first_mask_that_is_mended_is_a_recovery_and_the_reverse_is_harm():
    found = [
        behaviour(turns(("I click.", CLICK), ("I box it.", BOX), ("Done.", Finish(2))), (0.2, 0.9), 0.9),  # recovered
        behaviour(turns(("I click.", CLICK), ("I finish.", Finish(1))), (0.2,), 0.2),  # wrong, committed
        behaviour(turns(("I click.", CLICK), ("Done.", Finish(1))), (0.8,), 0.8),  # right at once
        behaviour(turns(("I box it.", BOX), ("I click.", CLICK), ("Done.", Finish(2))), (0.9, 0.1), 0.1),  # harmed
        behaviour(turns(("I box it.", BOX), ("Done.", Finish(1))), (0.6,), 0.6),  # neither
        behaviour(turns(("It is not here; I finish.", Finish(None))), (), 1.0),  # no mask at all
    ]
    figures = summarize_behaviours(found)
    assert figures["first_masks"] == 5 and figures["first_iou"] == pytest.approx((0.2 + 0.2 + 0.8 + 0.9 + 0.6) / 5)
    assert (figures["first_wrong"], figures["recovery"]) == (2, 0.5)
    assert (figures["first_right"], figures["harm"]) == (2, 0.5)
    assert figures["calls"] == 7 / 6 and figures["agreement"] == 1.0 and figures["acts_named"] == 13


def test_behaviour_does_not_follow_what_a_convention_drops():
    """A wrong mask where nothing is meant, then none: recovered, although an empty union is dropped from gIoU."""
    nothing, some = np.zeros((1, 9), bool), np.ones((1, 9), bool)
    sample = Sample("s", np.zeros((1, 9, 3), np.uint8), "it", nothing)
    counts = Counts("s", pixel_counts(nothing, sample), Status.FINISHED, 2, 0)
    said = turns(("I click.", CLICK), ("I finish.", Finish(None)))
    example = {"query": "it", "record": json.dumps({"turns": [{"text": text} for text in said]})}
    record = Record(counts, {}, 0.0, example, ((1, pixel_counts(some, sample)),))
    found = recorded_behaviour(record, MetricConfig(empty_policy="dropped"))
    assert (found.ious, found.iou) == ((0.0,), 1.0) and summarize_behaviours([found])["recovery"] == 1.0


def test_a_thought_agrees_with_one_of_the_acts_that_it_names():
    said = turns(
        ("The cup is here; I box it.", CLICK),  # says one, does the other
        ("I click on it.", BOX),
        ("The mask misses a part; I add a click.", Segment((1.0, 1.0, 9.0, 9.0), ((5.0, 5.0),), (1,))),  # both: fine
        ("I look at it closer.", Zoom((1.0, 1.0, 9.0, 9.0))),
        ("I rotate.", Rotate(1)),
        ("I need the whole image.", ResetView()),
        ("Hm.", CLICK),  # names none
    )
    found = behaviour([*said, "<think>I finish.</think> nothing"], (), 0.0)  # named, and malformed
    assert (found.spoken, found.agreeing, found.calls) == (7, 4, 4)


def test_only_the_thought_is_read():
    assert named_acts('<tool_call>{"name": "segment", "arguments": {"box": [1, 2, 3, 4]}}</tool_call>') == set()
    assert named_acts("<think>A mailbox.</think>") == set() and named_acts("<think>I BOX it") == {"box"}


@pytest.mark.parametrize(
    ("thought", "acts"),
    [("The target is the cardboard box on the left.", set()), ("The marked lane at this point of the market.", set()),
     ("I'll draw a bounding box around it.", {"box"}), ("Let me add a negative point there.", {"click"}),
     ("It is small, so I zoom in.", {"zoom"}), ("I will box it and click on its middle.", {"box", "click"}),
     ("The mask covers it. Done.", {"finish"}), ("The race is at its finish line.", set()),
     ("I click the click box; I finish.", {"click", "finish"})],
)  # fmt: skip
def test_an_act_is_what_somebody_does(thought, acts):
    assert named_acts(f"<think>{thought}</think>") == acts


def test_the_words_of_the_query_name_no_act():
    assert named_acts("<think>The click wheel is here; I box it.</think>", "the click wheel") == {"box"}


def test_nothing_to_count_is_none():
    figures = summarize_behaviours([behaviour([], (), 0.0)])
    assert {name for name, value in figures.items() if value is None} == {
        "first_iou", "recovery", "harm", "agreement",
    }  # fmt: skip
    assert summarize_behaviours([])["calls"] is None
