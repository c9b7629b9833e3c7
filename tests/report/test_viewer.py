"""The viewer: rows of files that grow, filters by a hand count, who is served and what, no markup but ours."""

import http.client
import json
import os
import threading

import pytest
from agent_fakes import DiscSegmenter, disc, make_image, run
from PIL import Image

from rsagent_jax.agent.replay import state_to_json
from rsagent_jax.agent.tools import Finish, Segment, render_call
from rsagent_jax.masks import encode_rle
from rsagent_jax.report import rows as rows_module
from rsagent_jax.report.rows import RowIndex, select_rows
from rsagent_jax.report.viewer import GAIN, PAGE, SECOND, Viewer, serve
from rsagent_jax.runtime.command import run_command
from tests.refusals import refused
from tests.report.written import check_markup, check_script

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"' ]]>"
HEAD = json.dumps({"settings": {}}) + "\n"


def line(number, iou=0.5, at=1.0, **more):
    """Of an evaluation's journal; it has `number` % 4 turns."""
    record = json.dumps({"turns": [{"text": f"turn {k}"} for k in range(number % 4)]})
    example = {"id": f"s{number}", "query": f"thing {number}", "iou": iou, "status": "finished", "ious": [], "gt": None}
    example |= {"image": "", "record": record} | more
    return json.dumps({"id": example["id"], "at": at, "example": example}) + "\n"


def journal(workdir, *lines, name="00000-of-00001.jsonl"):
    """The file of a journal."""
    path = workdir / "shards" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HEAD + "".join(lines))
    return path


@pytest.fixture
def parsed(monkeypatch):
    """How many bytes of how many lines were parsed."""
    found = []
    parse = rows_module.parse_object
    monkeypatch.setattr(rows_module, "parse_object", lambda text: found.append(len(text)) or parse(text))
    return found


def keys(index):
    return [key.partition(":")[2] for key in index.rows]


# --- Files that grow ---


def test_a_growing_file_is_read_on_from_where_it_was_and_half_a_line_is_no_row(tmp_path, parsed):
    path, index = journal(tmp_path / "e", line(0), line(1)), RowIndex(tmp_path / "e")
    first = index.refresh()
    assert keys(index) == ["s0", "s1"] and len(parsed) == 3
    assert index.refresh() == first and len(parsed) == 3
    text = line(2)
    for part, found in ((text[:30], ["s0", "s1"]), (text[30:], ["s0", "s1", "s2"])):
        with path.open("a") as file:
            file.write(part)
        index.refresh()
        assert keys(index) == found
    assert parsed[3:] == [len(text)] and index.refresh() == first + 1
    other = path.with_name("new")
    other.write_text(HEAD + line(7) + "{\n[]\n" + json.dumps({"id": "s8", "failed": {"kind": "x", "why": "y"}}) + "\n")
    os.replace(other, path)  # as a rewind does
    index.refresh()
    assert keys(index) == ["s7"]
    assert [note.split()[0] for note in index.notes()] == ["2", "1"]  # damaged; without a trajectory
    for end in (lambda: path.write_text(""), path.unlink):
        journal(tmp_path / "e", line(5))
        index.refresh()
        assert keys(index) == ["s5"]
        end()
        index.refresh()
        assert keys(index) == []


def test_the_latest_row_of_an_id_counts_whichever_shard_has_it(tmp_path):
    journal(tmp_path, line(0, iou=0.1, at=5.0), line(1, iou=0.2), name="00000-of-00002.jsonl")
    journal(tmp_path, line(0, iou=0.3, at=4.0), line(1, iou=0.4, at=2.0), name="00001-of-00002.jsonl")
    index = RowIndex(tmp_path)
    index.refresh()
    assert [row.values["iou"] for row in index.rows.values()] == [0.1, 0.4]


def test_ten_thousand_rows_are_read_once_and_shown_by_the_page(tmp_path, parsed):
    path, viewer = journal(tmp_path, *(line(k, iou=k / 1e4) for k in range(10_000))), Viewer([tmp_path])
    page = viewer.rows({"page": "199"})
    assert (page["found"], page["start"], len(page["rows"])) == (10_000, 9950, PAGE)
    assert page["rows"][0]["sample"] == "s9950" and len(parsed) == 10_001
    assert [row["sample"] for row in viewer.rows({"sort": "-iou"})["rows"][:2]] == ["s9999", "s9998"]
    assert len(parsed) == 10_001  # nothing is read again
    with path.open("a") as file:
        file.write(line(10_000))
    assert viewer.rows({"page": "200"})["rows"][0]["sample"] == "s10000" and len(parsed) == 10_002
    viewer.trajectory(page["rows"][3]["key"])
    assert len(parsed) == 10_003  # its own line


def group_line(step):
    """Of rollouts.jsonl: two trajectories."""
    told = [
        {"status": s, "turns": ["a"] * n, "advantage": n - 1.0, "reward": r and {"total": r, "final/iou": r / 2}}
        for s, n, r in (("finished", step, 0.2 * step), ("max_turns", 8, None))
    ]
    line = {"step": step, "id": f"r{step}", "query": f"Q{step}", "gt": None, "image": "", "trajectories": told}
    return json.dumps(line | {"played": [{"iou": None, "ious": [], "record": "{}"}] * 2}) + "\n"


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({}, ["1/0", "1/1", "2/0", "2/1", "3/0", "3/1"]),
        ({"status": "max_turns"}, ["1/1", "2/1", "3/1"]),
        ({"q": "q2"}, ["2/0", "2/1"]),
        ({"q": "R3"}, ["3/0", "3/1"]),
        ({"reward": "0.3.."}, ["2/0", "3/0"]),  # a trajectory without a reward is in no range of it
        ({"final/iou": "..0.25", "turns": "2.."}, ["2/0"]),
        ({"step": "2..2", "advantage": "0.."}, ["2/0", "2/1"]),
        ({"sort": "-reward"}, ["3/0", "2/0", "1/0", "1/1", "2/1", "3/1"]),
        ({"sort": "reward", "source": "w/rollouts"}, ["1/0", "2/0", "3/0", "1/1", "2/1", "3/1"]),
        ({"source": "elsewhere"}, []),
    ],
)
def test_filters_and_order(tmp_path, asked, found):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "rollouts.jsonl").write_text("".join(map(group_line, (1, 2, 3))))
    index = RowIndex(tmp_path)
    index.refresh()
    assert [row.key.partition(":")[2] for row in select_rows(index.rows.values(), asked)] == found


def test_queries_that_are_none_and_directories_that_are_none_are_refused(tmp_path, capsys):
    for text in ("x..", "3", "1..2..3"):
        refused(f"iou={text} is no range", select_rows, [], {"iou": text})
    refused("page=x is no number", Viewer([tmp_path]).rows, {"page": "x"})
    for words, given in (("is no directory", [str(tmp_path / "none")]), ("not 3", [str(tmp_path)] * 3)):
        assert run_command("rsagent_jax.view", given) == 2 and words in capsys.readouterr().err
    export = f"--export={tmp_path / 'page.html'}"
    assert run_command("rsagent_jax.view", [str(tmp_path), export]) == 2
    said = capsys.readouterr()
    assert (
        "has no trajectories" in said.err and f"nothing that could be shown is in {tmp_path} yet: shards/" in said.out
    )
    assert run_command("rsagent_jax.view", [str(tmp_path), f"--export={tmp_path}"]) == 2
    assert "is a folder; give a file" in capsys.readouterr().err
    journal(tmp_path, line(1))
    for query, says in (
        ("sort=-iuo", "the value 'iuo'; did you mean iou?"),
        ("iuo=..0.9", "the value 'iuo'; did you mean iou?"),
        ("status=done", "the ending 'done'; there are finished"),
    ):
        assert run_command("rsagent_jax.view", [str(tmp_path), export, f"--query={query}"]) == 2
        assert f"--query: no trajectory has {says}" in capsys.readouterr().err
    assert run_command("rsagent_jax.view", [str(tmp_path), export, "--query=sort=-iou&turns=..3&status=finished"]) == 0


# --- What is shown ---


def played(workdir, name, place, texts=()):
    """A line of a journal with a real trajectory, whose picture is below the work directory."""
    image, truth = make_image(56, 56), disc(56, 56, 28, 28, 14)
    workdir.mkdir(exist_ok=True)
    Image.fromarray(image).save(workdir / "image.png")
    calls = [render_call(Segment(points=((place, 28.0),), labels=(1,)), EVIL), render_call(Finish(1), "Done.")]
    state = run([*texts, *calls], DiscSegmenter(14), image, EVIL, history_size=56)
    example = {"id": name, "query": EVIL, "iou": 0.25, "status": str(state.status), "ious": [0.25]}
    example |= {"gt": encode_rle(truth), "image": "image.png", "record": state_to_json(state)}
    return json.dumps({"id": name, "at": 1.0, "example": example}) + "\n"


def test_an_export_is_one_file_with_everything_in_it_escaped(tmp_path, capsys):
    folder, out = tmp_path / "run", tmp_path / "out" / "page.html"
    journal(folder, played(folder, EVIL, 28.0, [f"\ud800 {EVIL}"]), played(folder, "b", 28.0), line(3))
    assert run_command("rsagent_jax.view", [str(folder), f"--export={out}", "--rows=2"]) == 0
    assert "2 of 3 trajectories" in capsys.readouterr().out
    text = out.read_text(encoding="utf-8")
    scripts = [element for element in check_markup(text) if element.tag == "script"]
    check_script(text)
    assert len(scripts) == 2 == text.count("<script") and scripts[0].get("type") == "application/json"
    embedded = json.loads(scripts[0].text)
    assert embedded["left_out"] == 1 and [row["sample"] for row in embedded["rows"]] == [EVIL, "b"]
    for markup in embedded["trajectories"].values():
        found = check_markup(markup)
        assert not {element.tag for element in found} & {"script", "iframe", "form"}
        assert sum(element.tag == "img" for element in found) == 3  # question, mask, answer
        kinds = [element.get("class") for element in found if element.tag == "path"]
        assert kinds == ["truth", "mask", "truth", "mask fill", "truth"] and "IoU 0.250" in markup
        assert EVIL in "".join(found[0].itertext())
    assert "\ufffd" in embedded["trajectories"][f"run:{EVIL}"]


def test_two_directories_are_joined_by_the_sample(tmp_path):
    journal(tmp_path / "a", line(0, iou=0.25), line(1, iou=0.5), played(tmp_path / "a", "p", 20.0))
    journal(tmp_path / "b", line(0, iou=0.75), played(tmp_path / "b", "p", 30.0), line(9))
    viewer = Viewer([tmp_path / "a", tmp_path / "b"])
    rows = {row["sample"]: row["values"] for row in viewer.rows({"sort": "-gain"})["rows"]}
    assert list(rows) == ["s0", "p", "s1"] and rows["s0"][SECOND] == 0.75 and rows["s0"][GAIN] == 0.5
    assert GAIN not in rows["s1"]
    markup = viewer.trajectory("a:p")
    assert markup.count('class="strip"') == 2 and f"<b>{tmp_path / 'b'}</b>" in markup
    assert "has no trajectory of this sample" in viewer.trajectory("a:s1")
    assert "turn 0" in viewer.trajectory("a:s1") and "Cannot be shown: its picture" in viewer.trajectory("a:s1")
    refused("no trajectory 'b:s9'", viewer.trajectory, "b:s9")
    refused("tokens are kept by", viewer.tokens, "a:p")


# --- Who is served, and what ---


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    journal(root / "run", played(root / "run", "p", 28.0))
    (root / "secret").write_text("secret")
    with serve(Viewer([root / "run"]), 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address
        server.shutdown()


def get(address, path, method="GET", **headers):
    """(status, body, headers) of a path as it is written."""
    connection = http.client.HTTPConnection(*address)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), dict(answer.getheaders())


def test_the_loopback_interface_alone_is_listened_on_and_four_addresses_answer(address):
    assert address[0] == "127.0.0.1"
    page = check_markup(get(address, "/")[1])
    assert sum(element.tag == "script" for element in page) == 2
    row = json.loads(get(address, "/rows?iou=0.2..")[1])["rows"][0]
    assert row["key"] == "run:p" and json.loads(get(address, "/rows?iou=0.3..")[1])["found"] == 0
    status, markup, headers = get(address, "/trajectory?row=run%3Ap")
    assert status == 200 and check_markup(markup)[0].tag == "article"
    assert (
        headers["Content-Security-Policy"].startswith("default-src 'none'") and headers["Cache-Control"] == "no-store"
    )
    assert get(address, "/rows?iou=x")[:2] == (
        400,
        "iou=x is no range; the form is iou=0.2..0.8, and either end may be left out",
    )
    assert get(address, "/tokens?row=run%3Ap")[0] == 400
    refused("cannot be listened on", serve, Viewer([]), address[1])


@pytest.mark.parametrize(
    "path",
    ["/../secret", "/%2e%2e/secret", "//secret", "/run/image.png", "/rows/../../secret", "/trajectory/..%2fsecret"],
)
def test_paths_are_no_files(address, path):
    assert get(address, path)[:2] == (404, "there is nothing here")


@pytest.mark.parametrize("key", ["../secret", "..%2f..%2fsecret", "%2fetc%2fpasswd", "run%3A..%2Fsecret", ""])
def test_keys_are_no_files(address, key):
    status, text, _ = get(address, f"/trajectory?row={key}")
    assert status == 400 and text.startswith("there is no trajectory")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example:80", "", "localhost"])
def test_pages_of_other_names_are_refused(address, host):
    """A name elsewhere that resolves to this machine: the browser would let its page read the answer."""
    assert get(address, "/rows", Host=host)[0] == (200 if host == "localhost" else 403)


def test_nothing_can_be_changed(address):
    assert get(address, "/rows", method="POST")[0] == 501
