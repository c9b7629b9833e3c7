"""What is logged is found again after a kill at any byte, each step once."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsagent_jax.runtime.train_log import MetricsLog, keep_lines
from tests.refusals import refused

ROWS = [("sft", 1), ("sft", 2), ("grpo", 1), ("grpo", 2), ("grpo", 3)]


@pytest.fixture
def log(tmp_path):
    log = MetricsLog(tmp_path)
    for stage, step in ROWS:
        log.write(stage, step, {"loss": 0.5, "turns": float("nan")})
        if stage == "grpo":
            log.examples(step, {"query": "größe}", "trajectories": []})
    yield log
    log.close()


def steps(path) -> list:
    return [(row.get("stage", "grpo"), row["step"]) for row in map(json.loads, path.read_text().splitlines())]


def test_a_rewound_log_has_each_step_once(log):
    log.rewind("grpo", 1)
    assert steps(log.path) == ROWS[:3] and steps(log.rollouts) == [("grpo", 1)]
    log.write("grpo", 2, {"loss": 0.25})
    assert steps(log.path) == ROWS[:4]
    log.rewind("sft", 0)
    assert steps(log.path) == [("grpo", 1), ("grpo", 2)] and steps(log.rollouts) == [("grpo", 1)]


def test_what_failed_is_said_with_its_number_and_kind(log):
    assert log.failures() == [] and log.counts["steps"] == 5
    for no_update in (1.0, 0.0):
        log.write("grpo", 4, {"no_update": no_update, "env_failed/timeout": 2.0, "env_failed/internal": 0.0})
    assert log.failures() == [
        "1 of 7 steps made no update: nothing in them taught anything",
        "4 trajectories ended because the segmenter failed: timeout 4",
    ]


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl"])
def test_half_a_line_is_cut_off_with_a_word(log, tmp_path, name, capsys):
    path = tmp_path / name
    whole = path.read_text()
    path.write_text(whole + '{"step": 4, "stage": "gr')
    log.rewind("grpo", 3)
    assert path.read_text() == whole
    assert f"{path}: the last line was half written" in capsys.readouterr().out
    log.rewind("grpo", 3)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("line", ["{", "[]", '{"step": 2}', "\udcff"])
def test_a_damaged_line_inside_is_named_and_nothing_is_changed(log, line):
    rows = log.path.read_text().splitlines()
    log.path.write_text("\n".join([*rows[:1], line, *rows[1:], ""]), errors="surrogateescape")
    before = log.path.read_bytes()
    refused(r"metrics\.jsonl, line 2 is damaged.*remove that line", log.rewind, "grpo", 1)
    assert log.path.read_bytes() == before


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.text(max_size=5), min_size=1, max_size=4), share=st.floats(0, 1))
def test_a_file_cut_at_any_byte_keeps_every_whole_line(tmp_path_factory, rows, share):
    path = tmp_path_factory.mktemp("cut") / "lines.jsonl"
    written = [json.dumps({"text": text, "nested": [{}, {}]}, ensure_ascii=False).encode() + b"\n" for text in rows]
    content = b"".join(written)
    cut = round(share * len(content))
    path.write_bytes(content[:cut])
    keep_lines(path, lambda row: True)
    ends = [len(b"".join(written[: i + 1])) for i in range(len(written))]
    assert path.read_bytes() == b"".join(written[: sum(end - 1 <= cut for end in ends)])
