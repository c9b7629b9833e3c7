"""Who can reach what a process listens on, by its sockets."""

import socket
import sys

import pytest

from rsagent_jax.runtime import listening
from tests.simulated import run_all_simulated

# Process 0 of two: (address, interface) of each listener, at the coordinator's port and the profiler's.
PROGRAM = """
import os, socket, sys
from rsagent_jax.runtime import listening, processes
processes.initialize_distributed()
import jax
port = listening.free_port()
listening.serve_profiler(port)
coordinator = int(os.environ["JAX_COORDINATOR_ADDRESS"].rpartition(":")[2])
for number in (coordinator, port):
    for found in listening.listeners(number):
        interface = found.getsockopt(socket.SOL_SOCKET, listening.DEVICE, 16).strip(b"\\0").decode()
        print(found.getsockname()[0], interface or "-")
processes.exchange("")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the sockets are told by Linux")
def test_coordinator_and_profiler_listen_on_loopback_alone():
    first, other = run_all_simulated(["-c", PROGRAM], 1, 2)
    assert first.split() == ["::ffff:127.0.0.1", "-", "::", "lo"]
    assert other.split() == ["::", "lo"]


def test_what_is_open_is_said_in_one_line(capfd, monkeypatch):
    assert listening.coordinator_options("127.0.0.1:7", 0) == {"coordinator_bind_address": "127.0.0.1:7"}
    assert listening.coordinator_options("10.0.0.2:7", 1) == {}  # it listens on nothing
    assert capfd.readouterr().err == ""
    assert listening.coordinator_options("10.0.0.2:7", 0) == {}
    listening.tie_coordinator(8482, 4)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2 and all("without TLS or a token" in line and "docs/security.md" in line for line in said)
    with socket.create_server(("", 0)) as server:  # the only host of a slice
        listening.tie_coordinator(server.getsockname()[1], 1)
        tied = server.getsockopt(socket.SOL_SOCKET, listening.DEVICE, 16) if listening.DEVICE else b""
        assert bool(capfd.readouterr().err) == (tied != b"lo\0")
        monkeypatch.setattr(listening, "DEVICE", None)
        listening.tie_coordinator(server.getsockname()[1], 1)
    assert "the coordinator can be reached at port" in capfd.readouterr().err
