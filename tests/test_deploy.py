"""The files of deploy/, as far as no container is needed: they are read, and what they run is known to the programs.

Nothing here builds an image or talks to a cluster.
"""

import pathlib
import re
import shlex

import pytest
import yaml

from tests.test_docs import check_command
from tests.test_imports import _pins

ROOT = pathlib.Path(__file__).parents[1]
COMPOSE = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
JOBSET = yaml.safe_load((ROOT / "deploy/jobset.yaml").read_text())
JOB = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]
POD = JOB["template"]["spec"]


def instructions(name: str) -> list[tuple[str, str]]:
    """(FROM, RUN, …; its words) of a Dockerfile."""
    lines = re.sub(r"^#.*\n", "", re.sub(r"\\\n\s*", "", (ROOT / "deploy" / name).read_text()), flags=re.MULTILINE)
    return [tuple(line.split(None, 1)) for line in lines.splitlines() if line]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.sidecar"])
def test_an_image_has_the_pinned_packages_and_files_that_are_there(name):
    found = instructions(name)
    assert found[0][0] == "FROM" and found[-1][0] == "CMD"
    known = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT", "CMD"}
    assert {kind for kind, _ in found} <= known
    pins = _pins("requirements.txt") | _pins("requirements-test.txt")
    installed = [word for kind, text in found if kind == "RUN" for word in shlex.split(text) if "==" in word]
    assert dict(pin.split("==") for pin in installed).items() <= pins.items()
    copied = [word for kind, text in found if kind == "COPY" for word in text.split()[:-1]]
    assert copied and all((ROOT / word).exists() for word in copied)
    if name == "Dockerfile":
        assert not installed and "-c requirements.txt" in dict(found)["RUN"]
    else:
        assert {"torch", "torchvision", "sam2"} <= {pin.split("==")[0] for pin in installed}


def test_the_commands_are_known_to_their_programs(monkeypatch):
    sidecar, policy = COMPOSE["sidecar"], COMPOSE["policy"]
    entry = dict(instructions("Dockerfile.sidecar"))["ENTRYPOINT"]
    for words in ([*yaml.safe_load(entry), *sidecar["command"]], policy["command"], POD["containers"][0]["command"]):
        check_command(words, monkeypatch)
    assert set(COMPOSE) == {"sidecar", "policy"}
    for service in sidecar, policy:
        assert (ROOT / "deploy" / service["build"]["context"] / service["build"]["dockerfile"]).exists()
    # On the host's own network, so what listens there must be on loopback.
    listens = [word for word in sidecar["command"] if "address=" in word]
    assert len(listens) == 2 and all("=127.0.0.1:" in word for word in listens)


def test_a_slice_on_gke_ends_on_a_users_mistake_alone():
    hosts, chips = JOB["parallelism"], POD["containers"][0]["resources"]["limits"]["google.com/tpu"]
    rows, columns = map(int, POD["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert hosts == JOB["completions"] and hosts * chips == rows * columns == 16
    assert "--config.slice=v5e-16" in POD["containers"][0]["command"]
    (rule,) = JOB["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": POD["containers"][0]["name"], "operator": "In", "values": [2]}
    (ends,) = JOBSET["spec"]["failurePolicy"]["rules"]
    assert (ends["action"], ends["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert JOB["backoffLimit"] == 0 and POD["restartPolicy"] == "Never"
