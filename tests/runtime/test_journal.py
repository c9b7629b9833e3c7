"""Which rows of a journal count: the latest of an id, made of what its sample is made of now, and never a failure."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsagent_jax.config.schema import DataConfig, SamplingConfig
from rsagent_jax.runtime import journal
from rsagent_jax.runtime.journal import Journal
from rsagent_jax.runtime.processes import Share
from rsagent_jax.types import DataError
from tests.refusals import refused

SETTINGS = {"seed": 0, "data": {"split": "val", "exclude": ("a",)}}
HTML = "<!DOCTYPE html>\n<html><body>404</body></html>\n"


def add(folder, current, rows, share=Share(), settings=SETTINGS):  # noqa: B008
    """Rows are (id, value), or (id, value, failed kind)."""
    book = Journal(folder, share, settings, current)
    for id, value, *kind in rows:
        failed = {"failed": {"kind": kind[0], "why": "?"}} if kind else {}
        book.add({"id": id, "value": value} | failed)
    book.close()
    return book


def values(folder, current=None):
    return {row["id"]: row["value"] for _, row in journal.read_journal(folder, SETTINGS, current)}


def test_what_has_changed_is_done_again_and_its_new_row_counts(tmp_path):
    before, after = {"a": "1", "b": "1"}, {"a": "2", "b": "1"}
    assert add(tmp_path, before, [("a", 10), ("b", 11)]).notes == []
    book = add(tmp_path, after, [])
    assert book.done == {"b"} and book.changed == ["a"] and book.notes == ["changed since, done again: 1 (a)"]
    assert values(tmp_path, after) == {"b": 11}
    # in a file that sorts before the old one as well as after it
    assert add(tmp_path, after, [("a", 20)], Share(0, 3)).done == {"a", "b"}
    assert values(tmp_path, after) == values(tmp_path) == {"a": 20, "b": 11}
    # the first mask again: nobody who only reads could tell that its old row is right, so it is done again
    assert add(tmp_path, before, [("a", 30)]).changed == ["a"]
    assert values(tmp_path, before) == values(tmp_path) == {"a": 30, "b": 11}


def test_what_is_no_longer_in_the_data_is_left_out_with_a_word(tmp_path):
    add(tmp_path, {"a": "1", "b": "1"}, [("a", 10), ("b", 11)])
    book = add(tmp_path, {"b": "1", "c": "1"}, [])
    assert book.done == {"b"} and book.gone == ["a"]
    assert book.notes == ["no longer in the data, left out: 1 (a)"]
    assert values(tmp_path, {"b": "1", "c": "1"}) == {"b": 11}


def test_a_row_takes_the_place_of_an_earlier_one_whatever_the_clock_of_its_machine_says(tmp_path, monkeypatch):
    current = {"a": "1"}
    add(tmp_path, current, [("a", 0, "timeout")], Share(0, 2))
    now = time.time()
    monkeypatch.setattr(journal.time, "time", lambda: now - 300)
    assert add(tmp_path, current, [("a", 2)], Share(1, 2)).done == {"a"}
    assert journal.survey(tmp_path, SETTINGS, current) == {"a": None} and values(tmp_path, current) == {"a": 2}


def test_a_failure_is_told_of_and_is_not_done(tmp_path):
    current = {"a": "1", "b": "1"}
    assert add(tmp_path, current, [("a", 0, "timeout"), ("b", 1)]).done == {"b"}
    assert journal.survey(tmp_path, SETTINGS, current) == {"a": {"kind": "timeout", "why": "?"}, "b": None}
    book = add(tmp_path, current, [("a", 2)])
    assert book.changed == [] and journal.survey(tmp_path) == {"a": None, "b": None}
    assert journal.survey(tmp_path, SETTINGS, {"a": "2", "b": "1"}) == {"b": None}


step = st.tuples(st.sampled_from("abc"), st.integers(0, 2), st.booleans(), st.integers(0, 2))


@settings(max_examples=40, deadline=None)
@given(st.lists(step, max_size=12), st.lists(st.integers(0, 2), min_size=3, max_size=3))
def test_the_latest_row_decides_whatever_file_it_is_in(tmp_path_factory, steps, now):
    folder = tmp_path_factory.mktemp("journal")
    wanted = {}
    clock = iter(range(1, 100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: float(next(clock)))
        for n, (id, version, failed, shard) in enumerate(steps):
            add(folder, {id: str(version)}, [(id, n, "timeout") if failed else (id, n)], Share(shard, 3))
            wanted[id] = (n, version, failed)
    current = dict(zip("abc", map(str, now), strict=True))
    of = {id: n for id, (n, version, failed) in wanted.items() if str(version) == current[id]}
    assert values(folder, current) == of
    done = {id for id in of if not wanted[id][2]}
    assert Journal(folder, Share(2, 3), SETTINGS, current).done == done
    in_order = [row["value"] for _, row in journal.read_journal(folder, by="value")]
    assert in_order == sorted(n for n, _, _ in wanted.values())


def test_a_half_written_line_is_cut_off_with_a_word(tmp_path):
    current = {"a": "1", "b": "1"}
    add(tmp_path, current, [("a", 1), ("b", 2)])
    path = next(tmp_path.iterdir())
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    book = add(tmp_path, current, [("b", 3)])
    half = len(data) - 5 - data[:-5].rfind(b"\n") - 1
    (note,) = book.notes
    assert note.startswith(f"{path}: the last line was half written") and note.endswith(f"({half} bytes)")
    assert values(tmp_path, current) == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "it is empty"), (HTML, "<!DOCTYPE html>"), ('{"settings": {"se', "it begins with"), ("[]\n", "")],
)
def test_a_file_that_is_no_journal_is_a_fault_by_name(tmp_path, text, said):
    add(tmp_path, {"a": "1"}, [("a", 1)])
    bad = tmp_path / "00001-of-00002.jsonl"
    bad.write_text(text)
    says = f"00001-of-00002.jsonl is no journal of this command .*{said}"
    refused(says, add, tmp_path, {"a": "1"}, [])
    refused(says, values, tmp_path)
    (tmp_path / "00000-of-00001.jsonl").unlink()
    refused(says, journal.settings_of, tmp_path)


def test_other_settings_are_named_by_field(tmp_path):
    add(tmp_path, {"a": "1"}, [("a", 1)])
    other = SETTINGS | {"data": {"split": "test", "exclude": ("a",)}}
    says = r'other settings \(data.split: "val" there, "test" now\)\. Give another --workdir'
    refused(says, add, tmp_path, {"a": "1"}, [], settings=other)


def test_fingerprints_are_asked_for_by_place():
    class Samples:
        def fingerprint(self, i):
            if i == 2:
                raise DataError("the record is gone")
            return f"#{i}"

    assert journal.fingerprints(Samples(), {"a": 1, "b": 2}) == {"a": "#1", "b": ""}


def test_where_the_data_lie_is_no_setting():
    a = journal.decisive_settings(DataConfig(root="x", limit=0, unreadable="skip"))
    assert a == journal.decisive_settings(DataConfig(root="y", limit=5, unreadable="stop"))
    assert a["split"] == "train" and a["fingerprint"] == "content"
    few = journal.decisive_settings(SamplingConfig(patches=64, slots=2))  # a view with more patches ends a trajectory
    assert few["patches"] == 64 and "slots" not in few
