"""Files by name against a hub on loopback: what comes, how often it is sent, and what each fault is told as."""

import hashlib
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from sam_bridge import backends, hub
from tests.loopback_hub import SHA, serve_hub

pytestmark = pytest.mark.slow  # each start of a process imports the library
ROOT = pathlib.Path(__file__).parents[2]
BIG = np.random.default_rng(0).bytes(24 << 20)  # the library writes pieces of 10 MiB
FILES = {"org/toy": {"config.json": b"{}", "model.safetensors": BIG, "model.bin": b"not asked for"}}
SCRIPT = """
import sys
from sam_bridge import hub
try:
    print(hub.download(sys.argv[1], ["*.json", "*.safetensors"]))
except hub.HubError as error:
    sys.exit(f"HubError: {error}")
"""


def download(url, home, name="org/toy", **environment):
    """Directory or None, and all that was said. In a process of its own: the library reads the environment once."""
    environment = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | environment
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    command = [sys.executable, "-c", SCRIPT, name]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr
    last = done.stdout.strip().split("\n")[-1]
    return (pathlib.Path(last) if done.returncode == 0 else None), done.stdout + done.stderr


def test_files_come_once_and_are_those_that_were_asked_for(tmp_path):
    with serve_hub(files=FILES, revisions=("main", "v1", SHA)) as server:
        for name in ("org/toy", "org/toy", "org/toy@v1", f"org/toy@{SHA}"):
            directory, said = download(server.url, tmp_path, name)
            assert directory.name == SHA and {f.name for f in directory.iterdir()} == {
                "config.json",
                "model.safetensors",
            }
        assert (directory / "model.safetensors").read_bytes() == BIG
        assert sorted(server.sent) == [("config.json", 0, 2), ("model.safetensors", 0, len(BIG))]
    whole, said = download(server.url, tmp_path)  # nobody answers any more
    assert whole == directory and "was not asked" in said
    assert download(server.url, tmp_path, HF_HUB_OFFLINE="1")[0] == directory
    nothing, said = download(server.url, tmp_path / "other", HF_HUB_OFFLINE="1")
    assert nothing is None and "not here as a whole" in said and "HF_HUB_OFFLINE" in said


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("org/none", {}, "org/none is no directory here, and http"),
        ("org/toy@v9", {}, "no such revision"),
        ("org/toy", {"gated": True, "token": "hf_right"}, "is gated: accept its terms"),
        ("org/empty", {}, "has no file"),
    ],
)
def test_what_cannot_be_had_is_said_in_a_line(tmp_path, name, options, says):
    with serve_hub(files=FILES | {"org/empty": {"model.bin": b"x"}}, **options) as server:
        nothing, said = download(server.url, tmp_path, name, HF_TOKEN="hf_wrong")
        assert nothing is None and says in said.split("\n")[-2]


def test_a_token_opens_the_gate(tmp_path):
    with serve_hub(files=FILES, gated=True, token="hf_right") as server:
        assert download(server.url, tmp_path, HF_TOKEN="hf_right")[0]


def test_a_broken_wire_is_taken_up_where_it_broke(tmp_path):
    with serve_hub(files=FILES, cut_after=12 << 20, cuts=1) as server:
        directory, _ = download(server.url, tmp_path)
        assert (directory / "model.safetensors").read_bytes() == BIG
        starts = [first for name, first, _ in server.sent if name == "model.safetensors"]
        assert starts == [0, 10 << 20]


def test_other_bytes_are_removed_and_got_again(tmp_path):
    with serve_hub(files=FILES, damaged=True) as server:
        nothing, said = download(server.url, tmp_path)
        assert nothing is None and "model.safetensors: other bytes than the hub's" in said
        server.damaged = False
        directory, _ = download(server.url, tmp_path)
        assert (directory / "model.safetensors").read_bytes() == BIG
        # What another program put there is read once, too.
        blob = (directory / "model.safetensors").resolve()
        blob.write_bytes(b"x" * len(BIG))
        (tmp_path / "checked_sha256" / hashlib.sha256(BIG).hexdigest()).unlink()
        assert "other bytes" in download(server.url, tmp_path)[1] and not blob.exists()


def test_room_is_looked_for_before_a_byte_is_sent(monkeypatch, tmp_path):
    free = hub.shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: free)
    with pytest.raises(hub.HubError, match=r"needs 2\.00 GB more and .* has 0\.00 GB free; .*HF_HOME"):
        hub._check_room("org/toy", 2 * 10**9, tmp_path / "hub")


def test_names_of_repositories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/x").mkdir(parents=True)
    for name in ("Qwen/Qwen2.5-VL-7B-Instruct", "facebook/sam2.1-hiera-large@main", "a/b@refs/pr/3"):
        assert hub.is_repository(name)
    for name in ("runs/x", "weights", "/abs/path", "a/b/c", "./a/b", "a/b@", "gs://a/b", "../a"):
        assert not hub.is_repository(name)


def test_a_checkpoint_of_sam2_is_the_repositorys_one_pt_file(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "download", lambda name, patterns: tmp_path)
    (tmp_path / "sam2.1_hiera_large.pt").touch()
    assert backends.local_checkpoint("facebook/sam2.1-hiera-large") == str(tmp_path / "sam2.1_hiera_large.pt")
    (tmp_path / "other.pt").touch()
    for name, says in (("facebook/sam2.1-hiera-large", "holds 2 .pt files"), ("/nowhere/x.pt", "does not exist")):
        with pytest.raises(backends.BackendError, match=says):
            backends.local_checkpoint(name)
