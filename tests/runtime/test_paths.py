"""Files that grow by lines in a bucket, against one in memory; tests/test_buckets.py has the real client."""

import errno
import os
import resource
import threading
from unittest import mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rsagent_jax.runtime import paths
from rsagent_jax.types import DataError
from tests.refusals import refused


class Objects(dict):
    """The file system of a bucket, as far as parts ask for it."""

    pipe_file = dict.__setitem__

    def ls(self, folder: str, detail: bool) -> list[str]:
        if not (found := [name.removeprefix(paths.SCHEME) for name in self if name.startswith(f"{folder}/")]):
            raise FileNotFoundError(folder)
        return found

    def cat(self, names: list[str]) -> dict[str, bytes]:
        return {name.removeprefix(paths.SCHEME): self[name] for name in names}

    def rm(self, names: list[str]) -> None:
        for name in names:
            del self[name]


@pytest.fixture
def bucket(monkeypatch):
    bucket = Objects()
    monkeypatch.setattr(paths, "file_system", lambda: bucket)
    return bucket


def test_a_full_disk_leaves_no_empty_file_that_stands_for_a_whole_one(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        for write in (paths.create_file, paths.write_whole):
            refused("cannot be written .File too large", write, tmp_path / "x.json", "{}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("number", "status"),
    [(errno.ENOSPC, 74), (errno.EDQUOT, 74), (errno.EIO, 74), (errno.EACCES, 2), (errno.ENOENT, 2), (errno.ENOTDIR, 2)],
)
def test_what_another_start_may_get_over_has_a_status_of_its_own(number, status, tmp_path):
    with pytest.raises(DataError) as caught, paths.writing(tmp_path / "x"):
        raise OSError(number, os.strerror(number), "x")
    assert caught.value.status == status
    for said, status in ("No space left on device", 74), ("Permission denied", 2):
        assert paths.storage_kind(ValueError(f"INTERNAL: Error opening file: {said} [OS error]")).status == status


def test_a_step_in_a_path_is_no_answer_of_the_bucket(monkeypatch):
    monkeypatch.setattr(paths, "bucket_used", lambda: True)
    for step, answer, status in ((403, 503, 74), (402, 403, 2)):
        said = f"UNAVAILABLE: Error writing gs://b/run/checkpoints/sft/{step}/params: HTTP {answer}"
        assert paths.storage_kind(ValueError(said)).status == status


def test_a_folder_that_is_not_there_or_no_more_is_said(tmp_path):
    file = paths.AppendFile(tmp_path / "run/metrics.jsonl")
    said = "metrics.jsonl cannot be written: there is no .*/run, or it has been removed"
    for write in (file.add, lambda text: paths.write_whole(file.path, text)):
        refused(said, write, "{}")


def test_a_slow_request_holds_nobody_up_who_gathers_lines(bucket, monkeypatch):
    asked, answered, write = threading.Event(), threading.Event(), bucket.pipe_file
    monkeypatch.setattr(bucket, "pipe_file", lambda *a: (asked.set(), answered.wait(60), write(*a)), raising=False)
    monkeypatch.setattr(paths, "SEND_S", 0.01)
    file = paths.AppendFile(paths.open_path("gs://bucket/a.jsonl"), gather=True)
    file.add("0\n")
    assert asked.wait(60)
    file.add("1\n")
    assert not bucket  # the first is still on its way
    answered.set()
    file.close()
    assert paths.read_lines(file.path) == b"0\n1\n"


def test_whatever_ends_a_request_behind_the_work_is_raised_by_the_next_line(bucket, monkeypatch):
    raised, printed = threading.Event(), []

    def fail(name, data):
        raised.set()
        raise RuntimeError("the client is closed")

    monkeypatch.setattr(bucket, "pipe_file", fail, raising=False)
    monkeypatch.setattr(paths, "SEND_S", 0.01)
    monkeypatch.setattr(threading, "excepthook", printed.append)
    monkeypatch.setattr(paths, "bucket_used", lambda: False)
    file = paths.AppendFile(paths.open_path("gs://bucket/a.jsonl"), gather=True)
    file.add("0\n")
    assert raised.wait(60)
    with pytest.raises(RuntimeError, match="is closed"):
        file.close()
    with pytest.raises(RuntimeError, match="is closed"):
        file.add("1\n")
    assert not printed


STARTS = st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=4)  # of bursts of so many lines


@given(starts=STARTS, head=st.booleans(), gather=st.booleans(), close=st.booleans())
@example(starts=[[9]], head=True, gather=True, close=True)  # more than a part's at once, behind a small one
@example(starts=[[1, 9, 1], [1]], head=True, gather=False, close=False)
def test_lines_are_all_there_in_their_order_however_they_come(starts, head, gather, close):
    written, bucket = [], Objects()
    with mock.patch.object(paths, "file_system", return_value=bucket), mock.patch.object(paths, "MERGE", 4):
        path = paths.open_path("gs://bucket/a.jsonl")
        if head:  # as a journal does
            paths.write_lines(path, b"head\n")
            written.append(b"head\n")
        for bursts in starts:
            file = paths.AppendFile(path, gather)
            for size in bursts:
                lines = [f"{len(written) + i}\n" for i in range(size)]
                file.waiting += lines[:-1]  # they came while a request was on its way
                file.add(lines[-1])
                file._send_later()
                written += map(str.encode, lines)
                assert paths.read_lines(path) == b"".join(written)
            if close:
                file.close()
                assert len(bucket) <= 1 + len(written) / 4
        assert not written or paths.read_lines(path) == b"".join(written)
