"""Stands in for gcloud on PATH: one queued resource and its hosts, which are directories of $STAND_IN.

    calls       a line per call, its words in JSON
    state       of the queued resource; no file: there is none
    refused     what `create` says and fails with, if it is there
    breaks      if it is there, the connection of the next ssh breaks, as when a laptop sleeps

As of gcloud 528: a command whose connection broke is given to its host again; of several hosts' exit statuses the first
counts that is not 0; nothing runs on a slice that is not there.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

# Its commands that the docs and rsagent_jax.launch use, and their flags (those of gcloud 528, as its --help has them).
GCLOUD = {
    "config set": "",
    "services enable": "project",
    "storage rsync": "recursive exclude",
    "storage buckets create": "project location uniform-bucket-level-access",
    "storage buckets add-iam-policy-binding": "role member",
    "compute tpus tpu-vm ssh": "zone project worker command ssh-flag quiet",
    "compute tpus tpu-vm list": "zone project",
    "compute tpus queued-resources create": "node-id zone project accelerator-type runtime-version spot quiet",
    "compute tpus queued-resources list": "filter format zone project quiet",
    "compute tpus queued-resources delete": "zone project force quiet",
}
HOSTS = 2
BROKEN = 255  # of ssh


def main(argv: list[str], home: pathlib.Path) -> int:
    with open(home / "calls", "a") as file:
        file.write(json.dumps(argv) + "\n")
    name = next(name for name in GCLOUD if " ".join(argv).startswith(f"{name} "))
    flags = dict(re.fullmatch(r"--([\w-]+)=?(.*)", word, re.DOTALL).groups() for word in argv if word[:2] == "--")
    assert {*flags} <= {*GCLOUD[name].split()}, argv
    state = home / "state"
    if name.endswith("list") and state.exists():
        print(state.read_text())
        if following := {"ACCEPTED": "PROVISIONING", "PROVISIONING": "ACTIVE"}.get(state.read_text()):
            state.write_text(following)
    elif name.endswith("create"):
        if (home / "refused").exists():
            print((home / "refused").read_text(), file=sys.stderr)
            return 1
        assert not state.exists() and flags["node-id"] == argv[4]
        state.write_text("ACCEPTED")
        for i in range(HOSTS):
            subprocess.run(["rm", "-rf", home / f"host_{i}"], check=True)
            (home / f"host_{i}").mkdir()
    elif name.endswith("delete"):
        state.unlink()
    elif name.endswith("ssh"):
        if state.read_text() != "ACTIVE":
            print("ERROR: (gcloud.compute.tpus.tpu-vm.ssh) the TPU is in state PREEMPTED", file=sys.stderr)
            return 1
        return next(filter(None, run_on_hosts(flags["command"], home)), 0)
    return 0


def run_on_hosts(command: str, home: pathlib.Path) -> list[int]:
    def start(i: int) -> subprocess.Popen:
        return subprocess.Popen(["bash", "-c", command], env=os.environ | {"HOME": f"{home}/host_{i}"})

    hosts = [start(i) for i in range(HOSTS)]
    if (home / "breaks").exists():
        (home / "breaks").unlink()
        time.sleep(0.5)
        hosts[1].kill()
        hosts[1].wait()
        hosts[1] = start(1)
    for i, host in enumerate(hosts):
        if status := host.wait():
            said = f"##### Command execution on worker {i} failed with exit status {status}. Continuing."
            print(said, file=sys.stderr, flush=True)
    return [host.returncode for host in hosts]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], pathlib.Path(os.environ["STAND_IN"])))
