"""Failures are counted by kind and named; the segmenter's in a row end the command."""

import numpy as np
from agent_fakes import DiscSegmenter, run

from rsagent_jax.data.sets.index import Entry, SampleIndex
from rsagent_jax.rollout.play import UNREADABLE, Failures, failure_of, is_segmenters, unmeasured
from rsagent_jax.types import Sample
from sam_bridge.types import FailureKind
from tests.refusals import refused
from tests.rollout import small

AWAY = ("segmenter, unavailable", "nobody there")


def test_a_run_of_failures_ends_the_command_and_one_answer_breaks_it(capsys):
    failures = Failures(3)
    for failure, masks in ((AWAY, 0), (AWAY, 0), (None, 1), (AWAY, 2), (AWAY, 0), (None, 0)):  # the last asked for none
        failures.played("s1", failure, masks)
    says = "failed 3 trajectories in a row, the last with: segmenter, unavailable: nobody"
    refused(says, failures.played, "s9", AWAY, 0)
    failures.add(UNREADABLE, "s4", "a.jpg is cut")
    failures.tell()
    out = capsys.readouterr().out
    assert "not done 5: segmenter, unavailable\n" in out and out.count("s1: nobody there") == 3  # the first few
    assert "not done 1: unreadable sample\n    s4: a.jpg is cut" in out
    patient = Failures(0)
    for _ in range(50):
        patient.played("s1", AWAY, 0)
    assert patient.counts == {AWAY[0]: 50} and is_segmenters(AWAY[0]) and not is_segmenters(UNREADABLE)


def test_an_endpoint_that_is_away_ends_the_command_too_and_one_that_refuses_does_not():
    failures, refusal = Failures(3), ("endpoint, refused", "prompt too long")
    away = [(f"endpoint, {kind}", "after 6 tries of http://h/v1") for kind in ("connection", "timeout", "server")]
    for failure in (*away[:2], None, refusal, refusal, refusal, away[0], refusal, away[1]):
        failures.played("s1", failure, 0)
    says = (
        "the endpoint failed 3 trajectories in a row.*endpoint, server: .*http://h/v1.*bring it back and run the same"
    )
    refused(says, failures.played, "s9", away[2], 0)


def test_only_the_segmenters_endings_are_its_failures():
    broken = run([small.click(5, 5)], DiscSegmenter(fail=[FailureKind.TIMEOUT]))
    assert failure_of(broken) == ("segmenter, timeout", "as the test asked")
    fine = run([small.click(5, 5), small.finish(1)])
    assert failure_of(fine) is None and failure_of(run(["x"] * 3)) is None


def test_a_picture_that_no_view_can_show_is_unreadable_by_name():
    thin = Sample("s", np.zeros((10, 2010, 3), np.uint8), "q", np.zeros((10, 2010), bool), path="thin.png")
    entry = type("Thin", (Entry,), {"load": lambda self: thin})("s", "q", "thin.png")
    refused("thin.png: image of 10x2010 pixels", SampleIndex("set", [entry]).__getitem__, 0)


def test_the_count_is_by_kind():
    said = str(unmeasured([AWAY[0], AWAY[0], "segmenter, timeout"], 400))
    assert said.startswith("3 of 400 samples are not measured (segmenter, timeout 1, segmenter, unavailable 2)")
