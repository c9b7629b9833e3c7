"""`rsagent_jax.data.get` against a server on loopback: what is fetched, taken up, refused and kept."""

import contextlib
import dataclasses
import hashlib
import http.server
import io
import json
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from rsagent_jax.data import download, get, sources
from rsagent_jax.data.download import RemoteFile
from rsagent_jax.data.sets.coco_questions import load_refcoco_m
from rsagent_jax.masks import encode_rle
from rsagent_jax.runtime import command
from rsagent_jax.tiny.synthetic import STAMP
from tests.data.sets.small_sets import square, write_reasonseg
from tests.refusals import refused

ROOT = pathlib.Path(__file__).parents[2]
DATA = bytes(range(256)) * 40  # 10,240 bytes


class Server(http.server.ThreadingHTTPServer):
    """Answers with `files` (path -> bytes, or a status); breaks off after `cut` bytes of each answer."""

    files, ranges, cut, pause = {}, True, None, 0

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []  # (path, Range header)
        self.token = ""  # that opens it
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Range"]))
        body = self.server.files.get(self.path, 404)
        if self.server.token and self.headers["Authorization"] != f"Bearer {self.server.token}":
            return self.send_error(401)
        if isinstance(body, int):
            return self.send_error(body)
        start = int(self.headers["Range"][len("bytes=") : -1]) if self.headers["Range"] and self.server.ranges else 0
        partial = start > 0
        if partial and start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            return self.end_headers()
        self.send_response(206 if partial else 200)
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        with contextlib.suppress(OSError):
            for at in range(start, len(body[: start + self.server.cut] if self.server.cut else body), 1 << 16):
                self.wfile.write(body[at : min(at + (1 << 16), start + (self.server.cut or len(body)))])
                time.sleep(self.server.pause)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "PAUSE_S", 0)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def make_zip(members, compress=zipfile.ZIP_STORED) -> bytes:
    """members: name (or ZipInfo) -> bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compress) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def fetched(server, folder, data=DATA, **known) -> bytes:
    server.files = server.files or {"/a.bin": data}
    path, digest = download.download_file(RemoteFile(f"{server.url}/a.bin", **known), folder)
    assert path == folder / "a.bin" and not (folder / "a.bin.partial").exists()
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    return path.read_bytes()


def test_a_file_comes_whole_and_checked(server, tmp_path):
    known = {"size": len(DATA), "sha256": hashlib.sha256(DATA).hexdigest()}
    assert fetched(server, tmp_path, **known) == DATA and server.asked == [("/a.bin", None)]
    assert fetched(server, tmp_path, **known) == DATA and len(server.asked) == 1  # it is there
    (tmp_path / "a.bin").write_bytes(DATA[:-1] + b"x")  # by hand, and another one
    refused("has the sha256 .*It is kept as .*a.bin.rejected", fetched, server, tmp_path, **known)


def test_what_has_come_is_not_fetched_again(server, tmp_path):
    (tmp_path / "a.bin.partial").write_bytes(DATA[:1000])
    assert fetched(server, tmp_path) == DATA and server.asked == [("/a.bin", "bytes=1000-")]


def test_a_connection_that_breaks_is_taken_up_as_long_as_bytes_come(server, tmp_path):
    server.cut = 1000  # of 10,240: eleven answers, more than TRIES
    assert fetched(server, tmp_path) == DATA
    assert [r for _, r in server.asked] == [None, *(f"bytes={n}-" for n in range(1000, 10240, 1000))]


def test_a_server_that_ignores_range_sends_all_of_it_again(server, tmp_path):
    server.ranges = False
    (tmp_path / "a.bin.partial").write_bytes(b"old" * 1000)
    assert fetched(server, tmp_path) == DATA and server.asked == [("/a.bin", "bytes=3000-")]
    (tmp_path / "a.bin").unlink()
    server.cut = 1000
    says = r"could not be fetched \(it ended after 1000 of 10240 bytes\). 1000 bytes are kept in .*a.bin.partial"
    refused(says, fetched, server, tmp_path)


@pytest.mark.parametrize("kept", [DATA, DATA + b"more"])
def test_a_part_that_is_whole_or_longer_than_the_file(server, tmp_path, kept):
    (tmp_path / "a.bin.partial").write_bytes(kept)
    assert fetched(server, tmp_path) == DATA


@pytest.mark.parametrize(
    ("answer", "known", "says"),
    [
        (404, {}, r"a.bin answers 404 Not Found: it has moved, or may not be fetched"),
        (403, {}, "answers 403"),
        (
            503,
            {},
            r"could not be fetched \(HTTP Error 503: .*run the same command again to go on, or put the file there",
        ),
        (DATA, {"size": 5}, "has 10240 bytes, not 5"),
        (DATA, {"sha256": "0" * 64}, f"has the sha256 {hashlib.sha256(DATA).hexdigest()}, not 0000"),
        (b"<!DOCTYPE html><title>quota</title>", {"size": 5}, "has 35 bytes, not 5 .*an HTML page, as a download that"),
    ],
)
def test_what_is_refused_is_said_in_one_message(server, tmp_path, answer, known, says):
    refused(says, fetched, server, tmp_path, answer, **known)
    assert not (tmp_path / "a.bin").exists()
    assert (tmp_path / "a.bin.rejected").exists() == isinstance(answer, bytes)


def test_a_full_disk(server, tmp_path):
    (tmp_path / "a.bin.partial").symlink_to("/dev/full")
    refused(r"a.bin.partial cannot be written \(No space left on device\).*make room", fetched, server, tmp_path)
    (tmp_path / "images").symlink_to("/dev/full")
    (tmp_path / "a.zip").write_bytes(make_zip({"images/a": b"x"}))
    refused("cannot be written", download.unpack, tmp_path / "a.zip", RemoteFile("http://x/a.zip"), tmp_path)


def link() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "a\\..\\..\\evil", "C:/evil", link()])
def test_an_archive_that_reaches_outside_is_not_unpacked(tmp_path, name):
    path = tmp_path / "a.zip"
    path.write_bytes(make_zip({"good": b"1", name: b"../evil"}))
    says = "1 of its members lie outside of the folder or are links, such as"
    refused(says, download.unpack, path, RemoteFile("http://x/a.zip"), tmp_path / "root")
    assert not list((tmp_path / "root").rglob("*")) and path.exists() and not (tmp_path / "evil").exists()


def test_an_archive_that_is_cut_or_damaged_and_one_that_was_half_unpacked(tmp_path):
    path, file, root = tmp_path / "a.zip", RemoteFile("http://x/a.zip", to="sub"), tmp_path / "root"
    whole = make_zip({"d/one": b"1" * 50, "d/two": b"2" * 50, "__MACOSX/d/._one": b"x"})
    path.write_bytes(whole[:-30])
    refused("a.zip is no zip archive, or cut short. It is kept as", download.check_file, path, file)
    path.write_bytes(whole.replace(b"2" * 50, b"2" * 49 + b"3"))
    refused(
        r"is damaged \(Bad CRC-32 for file 'd/two'\); what was unpacked of it stays", download.unpack, path, file, root
    )
    assert (root / "sub/d/one").read_bytes() == b"1" * 50 and not (root / "sub/d/two").exists() and not path.exists()
    path.write_bytes(whole)
    (root / "sub/d/one").write_bytes(b"!" * 50)  # as large as it should be: it is not written again
    assert download.unpack(path, file, root) == 2
    assert {p.name: p.read_bytes()[:1] for p in root.rglob("*") if p.is_file()} == {"one": b"!", "two": b"2"}


# ---------------------------------------------------------------------------------------------------- the command


def run(*argv) -> int:
    return command.run_command("rsagent_jax.data.get", [*map(str, argv), "--samples=3"])


@pytest.fixture
def mirror(server, dataset, monkeypatch):
    """RefCOCOg as its two archives, of synthetic scenes; COCO's own size and checksum do not hold for this one."""

    def packed(folder, inside):
        files = [path for path in sorted((dataset / folder).rglob("*")) if path.is_file()]
        return make_zip({f"{inside}/{path.relative_to(dataset / folder)}": path.read_bytes() for path in files})

    server.files = {"/m/refcocog.zip": packed("refcocog", "refcocog")}
    server.files["/m/train2014.zip"] = packed("images/mscoco/images/train2014", "train2014")
    (file,) = sources.SOURCES["coco2014"].files
    plain = dataclasses.replace(sources.SOURCES["coco2014"], files=(RemoteFile(file.url, file.to),))
    monkeypatch.setitem(sources.SOURCES, "coco2014", plain)
    monkeypatch.setenv(get.MIRROR, f"{server.url}/m/")
    return server


def test_refcocog_is_fetched_laid_out_and_looked_at(mirror, tmp_path, capsys):
    assert run("refcocog", f"--root={tmp_path}") == 1  # the counts are not those of the real set
    out = capsys.readouterr().out
    for text in (
        "page     https://github.com/lichengunc/refer", "licence  ", "train2014.zip (size not published, sha256 not",
        "set refcocog/umd/val", "verdict DIFFERS", "3 of 3 samples looked at were read",
        f"refcocog.zip: 2 files under {tmp_path}, sha256 {hashlib.sha256(mirror.files['/m/refcocog.zip']).hexdigest()}",
    ):  # fmt: skip
        assert text in out, out
    assert {path for path, _ in mirror.asked} == {"/m/refcocog.zip", "/m/train2014.zip"}
    for path in (tmp_path / "downloads").glob("*.zip"):
        path.unlink()
    (tmp_path / STAMP).write_text("{}")
    assert run("refcocog", f"--root={tmp_path}") == 0 and len(mirror.asked) == 2  # nothing is fetched again
    (tmp_path / "refcocog/instances.json").unlink()
    assert run("refcocog", f"--root={tmp_path}") == 0 and len(mirror.asked) == 3  # but what has been deleted is


def test_all_failures_stand_in_one_message_and_what_came_is_kept(mirror, tmp_path, capsys):
    mirror.files |= {"/m/refcocog.zip": 404, "/m/val2017.zip": b"other"}
    assert run("coco2017", "refcocog", f"--root={tmp_path}") == 2
    err = capsys.readouterr().err
    assert "refcocog.zip answers 404" in err and "val2017.zip has 5 bytes, not 815585330" in err
    assert "train2017.zip answers 404" in err and "Traceback" not in err
    kept = {path.name for path in (tmp_path / "downloads").iterdir()}
    assert {"train2014.zip", "train2014.zip.done", "val2017.zip.rejected"} == kept


def test_a_stop_keeps_what_has_come(server, tmp_path):
    server.files, server.pause = {"/unlabeled2017.zip": DATA * 1000}, 0.1  # 10 MB in 16 seconds
    argv = [sys.executable, "-m", "rsagent_jax.data.get", "unlabeled2017", f"--root={tmp_path}"]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 - also where pytest runs in the background
    process = subprocess.Popen([*argv, f"--base_url={server.url}"], stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    partial = tmp_path / "downloads/unlabeled2017.zip.partial"
    while process.poll() is None and not (partial.exists() and partial.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(100) == 130 and "stopped" in process.stderr.read()
    kept = partial.read_bytes()
    assert 0 < len(kept) < len(DATA) * 1000 and (DATA * 1000).startswith(kept)


def test_too_little_room_is_said_before_anything_is_fetched(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 10**9))
    assert run("coco2014", f"--root={tmp_path}", f"--base_url={server.url}") == 2
    assert "has room for 1.0 GB, and 27.0 GB are needed: make room" in capsys.readouterr().err and not server.asked


def test_what_takes_a_hand_is_told_and_then_looked_at(tmp_path, capsys):
    assert run("reasonseg", f"--root={tmp_path}") == 1
    out = capsys.readouterr().out
    assert "reasonseg waits for you (https://github.com/dvlab-research/LISA#dataset):\n  1. open https://drive" in out
    assert f"2. unpack them into {tmp_path}/ReasonSeg/" in out and "3. run the same command again" in out
    for split in ("val", "test"):
        write_reasonseg(tmp_path / "ReasonSeg" / split, "a", square(2, 2, 9))
    assert run("reasonseg", f"--root={tmp_path}") == 1  # 1 of 200
    out = capsys.readouterr().out
    assert "waits" not in out and "set reasonseg/test" in out and "published 779 samples" in out


def test_refcoco_m_comes_from_the_hub_with_the_hubs_checksums(server, tmp_path, monkeypatch, capsys):
    image, mask = io.BytesIO(), np.zeros((8, 9), bool)
    mask[2:5, 3:9] = True
    Image.new("RGB", (9, 8), (250, 0, 0)).save(image, "JPEG")
    name = "COCO_train2014_000000000007.jpg"
    sample = {
        "id": 70,
        "image_id": 7,
        "category": "dog",
        "supercategory": "animal",
        "label": "dog",
        "bbox": [3.0, 2, 6, 3],
    }
    sample |= {"sentences": ["left dog", " Dog "], "mask": {"counts": encode_rle(mask)["counts"], "size": [8, 9]}}
    row = {"image": {"bytes": image.getvalue(), "path": name}, "image_id": 7, "file_name": name, "samples": [sample]}
    parquet = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), parquet)
    path = "data/validation-00000-of-00001.parquet"
    listed = {"type": "file", "path": path, "size": len(parquet.getvalue()), "oid": "0" * 40}
    listed["lfs"] = {"oid": hashlib.sha256(parquet.getvalue()).hexdigest(), "size": listed["size"]}
    tree = "/api/datasets/moondream/refcoco-m/tree/main/data"
    server.files = {f"/datasets/moondream/refcoco-m/resolve/main/{path}": parquet.getvalue()}
    server.files[tree] = json.dumps([listed]).encode()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    assert run("refcoco_m", f"--root={tmp_path}") == 1  # 2 of 5,598 sentences
    assert "set refcoco_m/val  samples 2  pictures 1  published 5598 samples, 1190 pictures" in capsys.readouterr().out
    samples = load_refcoco_m(tmp_path)
    assert samples.ids == ["refcoco_m/val/70/0", "refcoco_m/val/70/1"] and samples.image_keys == ["coco/7"] * 2
    assert [s.query for s in samples] == ["left dog", "Dog"]
    np.testing.assert_array_equal(samples[1].gt_mask, mask)
    assert samples[0].image[0, 0, 0] > 240 and pathlib.Path(samples[0].path).read_bytes() == image.getvalue()
    server.token = "secret"
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert run("refcoco_m", f"--root={tmp_path / 'a'}") == 2
    assert "answers 401" in (said := capsys.readouterr().err) and "set HF_TOKEN to a token that may read it" in said
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert run("refcoco_m", f"--root={tmp_path / 'a'}") == 1 and "samples 2" in capsys.readouterr().out
    listed["lfs"]["oid"] = "1" * 64
    server.files[tree] = json.dumps([listed]).encode()
    assert run("refcoco_m", f"--root={tmp_path / 'b'}") == 2 and "not 1111" in capsys.readouterr().err
    server.files[tree] = b"<html>"
    assert run("refcoco_m", f"--root={tmp_path / 'c'}") == 2
    assert "does not list the files of moondream/refcoco-m" in capsys.readouterr().err


def test_a_token_is_shown_to_the_hub_and_not_to_whom_it_leads_on_to(server, tmp_path, monkeypatch):
    seen = []

    class Leading(Handler):
        def do_GET(self):
            seen.append((self.path, self.headers["Authorization"]))
            if self.path == "/hub/a.bin":
                self.send_response(302)
                self.send_header("Location", f"{server.url}/a.bin")
                return self.end_headers()
            return super().do_GET()

    server.RequestHandlerClass, server.files = Leading, {"/a.bin": DATA}
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/hub")
    monkeypatch.setenv("HF_TOKEN", "secret")
    path, _ = download.download_file(RemoteFile(f"{server.url}/hub/a.bin"), tmp_path)
    assert path.read_bytes() == DATA and seen == [("/hub/a.bin", "Bearer secret"), ("/a.bin", None)]


def test_a_bucket_is_copied_to_afterwards(capsys):
    assert run("gseval", "--root=gs://bucket/data") == 2
    assert "gcloud storage rsync --recursive --exclude='^downloads/' DIR gs://bucket/data" in capsys.readouterr().err


def test_names_and_what_would_be_done(tmp_path, capsys):
    assert run("refcocg", f"--root={tmp_path}") == 2
    assert "no data set is called 'refcocg'; did you mean refcocog?; there are coco2014, " in capsys.readouterr().err
    assert run("gseval", "--nofetch") == 0 and run() == 0
    out = capsys.readouterr().out
    assert "(4.2 MB, sha256 e14630a6" in out and all(f"{name}\n  page" in out for name in sources.SOURCES)
    assert run("gseval") == 2 and "--root=DIR is required" in capsys.readouterr().err


def test_every_check_is_a_benchmark_and_every_need_a_source():
    from configs import eval as eval_configs

    page = (ROOT / "docs/data.md").read_text()
    for name, source in sources.SOURCES.items():
        assert (
            f"`{name}`" in page and {*source.checks} <= {*eval_configs.NAMES} and {*source.needs} <= {*sources.SOURCES}
        )
        assert source.page.startswith("https://") and source.gives and (source.files or source.hub or source.steps)
