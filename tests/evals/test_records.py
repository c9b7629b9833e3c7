"""Results survive a kill at any byte, add up the same whatever the sharding, and do not mix settings."""

import contextlib
import dataclasses
import json
import os
import pathlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rsagent_jax.evals import records
from rsagent_jax.evals.metrics import Counts, judge, summarize_results
from rsagent_jax.runtime import journal
from rsagent_jax.runtime.processes import Share, parse_share
from rsagent_jax.types import Sample, Status
from tests.refusals import refused

SETTINGS = {"weights_sha256": "abc", "seed": 0, "agent": {"max_turns": 8}, "stages": (1, 2)}
CURRENT = {f"s{i}": f"print {i}" for i in range(11)}


def record(i):
    triple = (i % 4, 5 + i % 3, 6)
    counts = Counts(f"s{i}", dict.fromkeys(("excluded", "target", "background"), triple), Status.FINISHED, 1 + i % 3, 1)
    example = {"id": f"s{i}", "query": "größe\u2028\x85"}
    return records.Record(counts, {"size": [2, 2], "counts": "04"}, 0.25, example, sample_checksum=f"{i:016x}")


def opened(workdir, share=Share(), settings=SETTINGS):  # noqa: B008
    return contextlib.closing(journal.Journal(workdir / records.FOLDER, share, settings, CURRENT))


def write(workdir, share, samples, settings=SETTINGS):
    """Evaluates this shard's part of the samples that are not done."""
    with opened(workdir, share, settings) as book:
        left = book.left([(f"s{i}", i) for i in samples[share.index :: share.count]], "samples")
        for i in left:
            book.add(record(i).to_row())
    return left


def summary(workdir, n):
    found, _ = records.read_records(workdir, SETTINGS, CURRENT)
    assert set(found) == {f"s{i}" for i in range(n)}
    return summarize_results([judge(r.counts) for r in found.values()], {}, benchmark="toy")


def test_records_come_back_and_the_sum_does_not_depend_on_the_shards(tmp_path):
    sums = []
    for count in (1, 2, 5):
        workdir = tmp_path / str(count)
        for index in range(count):
            write(workdir, Share(index, count), range(11))
        sums.append(summary(workdir, 11))
        assert records.read_records(workdir, SETTINGS, CURRENT)[0]["s7"] == record(7)
    row = record(7).to_row()
    del row["sample_checksum"]  # as earlier versions wrote it
    assert records.Record.from_row(json.loads(json.dumps(row))) == dataclasses.replace(record(7), sample_checksum="")
    assert sums[0] == sums[1] == sums[2]


@settings(max_examples=40)
@given(st.floats(0, 1), st.integers(1, 3))
@example(0.75, 1)  # right before a newline
def test_a_kill_at_any_byte_leaves_no_hole_and_no_duplicate(tmp_path_factory, share, count):
    workdir = tmp_path_factory.mktemp("kill")
    write(workdir, Share(0, 1), range(8))
    path = next((workdir / records.FOLDER).iterdir())
    data = path.read_bytes()
    first = data.index(b"\n") + 1  # the file begins to exist with this line whole
    path.write_bytes(data[: first + int(share * (len(data) - first))])
    for index in range(count):  # it may go on with other shards
        write(workdir, Share(index, count), range(8))
    assert summary(workdir, 8)["n"] == 8
    assert write(workdir, Share(0, 1), range(8)) == []
    lines = [line for p in (workdir / records.FOLDER).iterdir() for line in p.read_text().splitlines()[1:]]
    assert sorted(json.loads(line)["counts"]["id"] for line in lines) == [f"s{i}" for i in range(8)]


@pytest.mark.parametrize("line", [b"{", b"\0\0\0", b"\xff", b'{"note": "mine"}', b'{"id": "s1", "failed": {}}'])
def test_a_damaged_line_is_named_and_its_work_done_again(tmp_path, line):
    write(tmp_path, Share(), range(3))
    path = next((tmp_path / records.FOLDER).iterdir())
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:2], line, *lines[3:]]))
    with opened(tmp_path) as book:
        assert book.done == {"s0", "s2"} and f"{path}, line 3: damaged" in book.notes[-1]
    assert line not in path.read_bytes().split(b"\n")
    write(tmp_path, Share(), range(3))
    assert summary(tmp_path, 3)["n"] == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_full_disk_is_said_and_what_was_written_is_kept(tmp_path):
    write(tmp_path, Share(), (0, 2))
    with opened(tmp_path) as book:
        book.file.path = pathlib.Path("/dev/full")
        refused("No space left on device.*What was written is kept", book.add, record(1).to_row())
    assert set(records.read_records(tmp_path, SETTINGS, CURRENT)[0]) == {"s0", "s2"}


def test_what_was_not_measured_comes_back_apart(tmp_path):
    lost = dataclasses.replace(record(1), failure=("segmenter, timeout", "late"))
    with opened(tmp_path) as book:
        for row in (record(0).to_row(), lost.to_row()):
            book.add(row)
        book.add({"id": "s2", "failed": {"kind": "unreadable sample", "why": "a.jpg is cut"}})
    assert book.done == {"s0"}
    found = records.read_records(tmp_path, SETTINGS, CURRENT)
    assert found == ({"s0": record(0), "s1": lost}, {"s2": "a.jpg is cut"})


def test_shares_of_the_command_line():
    assert parse_share("2/8", "--shard") == Share(2, 8)
    for wrong in ("8/8", "1", "-1/2", "a/b", "1/0", ""):
        refused(r"--shard=.* must be i/n", parse_share, wrong, "--shard")


def test_a_checksum_is_of_what_is_decoded_and_nothing_else():
    image, some, other = np.zeros((4, 4, 3), np.uint8), np.eye(4, dtype=bool), np.eye(4, k=1, dtype=bool)
    sample = Sample("a", image, "disc", some, path="a.png")
    same = [dataclasses.replace(sample, **change) for change in ({"path": "b.png"}, {"ignore_mask": some & other})]
    assert {records.checksum_of(s) for s in same} == {records.checksum_of(sample)}
    changes = [{"query": "disk"}, {"image": image + 1}, {"gt_mask": other}, {"ignore_mask": some}]
    changes += [{"ignore_mask": other}]
    assert len({records.checksum_of(dataclasses.replace(sample, **c)) for c in [{}, *changes]}) == 6
