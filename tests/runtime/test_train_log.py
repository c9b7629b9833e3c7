"""What is logged is found again after a kill at any byte, each step once."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsagent_jax.runtime.json_lines import keep_lines
from rsagent_jax.runtime.train_log import MetricsLog
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


def test_a_rewound_log_has_each_step_once(log, tmp_path):
    log.rewind("grpo", 1)
    assert steps(log.path) == ROWS[:3] and steps(tmp_path / "rollouts.jsonl") == [("grpo", 1)]
    log.write("grpo", 2, {"loss": 0.25})
    assert steps(log.path) == ROWS[:4]
    log.rewind("sft", 0)
    assert steps(log.path) == [("grpo", 1), ("grpo", 2)] and steps(tmp_path / "rollouts.jsonl") == [("grpo", 1)]


def test_rollouts_are_in_several_files_that_read_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr("rsagent_jax.runtime.train_log.ROTATE", 2)

    def logged(log, *played):
        for step in played:
            log.examples(step, {"query": f"{step}"})
        return [[row["step"] for row in map(json.loads, f.open())] for f in sorted(tmp_path.glob("rollouts*.jsonl"))]

    assert logged(MetricsLog(tmp_path), *range(1, 7)) == [[1, 2], [3, 4], [5, 6]]
    (tmp_path / "rollouts.jsonl").unlink()  # by somebody who needs the room
    (log := MetricsLog(tmp_path)).rewind("grpo", 3)
    assert logged(log) == [[3], []]
    assert logged(log, 4, 5) == [[3, 4], [5]]
    log.rewind("grpo", 4)
    assert logged(log, 5) == [[3, 4], [5]]
    (tmp_path / "rollouts_0000002.jsonl").unlink()
    log.rewind("grpo", 3)
    assert logged(log) == [[]]


def test_what_failed_is_said_with_its_number_and_kind(log):
    assert log.failures() == [] and log.counts["steps"] == 5
    for no_update in (1.0, 0.0):
        log.write("grpo", 4, {"no_update": no_update, "env_failed/timeout": 2.0, "env_failed/internal": 0.0})
    assert log.failures() == [
        "1 of 7 steps made no update: nothing in them taught anything",
        "4 trajectories ended because the segmenter failed: timeout 4",
    ]


DAMAGES = [b"{", b"[]", b'{"step": 2}', b"\xff", b"\0" * 20, b'{"note": "mine"}', b'{"step": 7, "stage": "\xff"}']


@pytest.mark.parametrize("line", DAMAGES)
def test_a_damaged_line_is_named_left_out_and_kept_beside(log, line, capsys):
    first, *rest = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join([first, line + b"\n", *rest, line + b"\n"]))
    log.rewind("grpo", 3)
    assert log.path.read_bytes() == b"".join([first, *rest])
    said = capsys.readouterr().out
    assert f"{log.path}, line 2: damaged" in said and ", and 1 more lines: left out, and kept in" in said
    aside = log.path.with_name("metrics.jsonl.damaged")
    assert aside.read_bytes() == 2 * (line + b"\n")
    log.rewind("grpo", 3)
    assert capsys.readouterr().out == "" and aside.exists()


def test_a_kill_while_a_log_is_mended_leaves_it_as_it_was(log, monkeypatch):
    before = log.path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        log.rewind("grpo", 1)
    assert log.path.read_bytes() == before


@pytest.mark.parametrize("name", ["loss", "l2_grads", "l2_updates"])
def test_what_an_update_is_made_of_must_be_finite(log, name):
    refused("grpo step 4: .* is nan; lower the learning rate", log.write, "grpo", 4, {name: float("nan")})
    assert steps(log.path) == [*ROWS, ("grpo", 4)]


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
