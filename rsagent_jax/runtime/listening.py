"""What a training process listens on, and who can reach it. docs/security.md has all ports.

jax's coordinator and its profiler know neither TLS nor a token, and listen on every network interface unless something
is done about it.
"""

import contextlib
import os
import socket
import stat
import sys
from collections.abc import Iterator

LOOPBACK = b"lo\0"  # the name of the interface
DEVICE = getattr(socket, "SO_BINDTODEVICE", None)  # of Linux


def free_port(number: int = 0) -> int:
    """For a process that is yet to start; `number` itself, if it is given and free, else OSError. For a minute nobody
    else gets it by chance: a connection of it has just been closed, and who names it may listen there all the same."""
    with socket.create_server(("127.0.0.1", number)) as server, socket.create_connection(server.getsockname()) as near:
        while (far := server.accept()[0]).getpeername() != near.getsockname():
            far.close()  # a stranger's
        far.close()
        near.recv(1)
        return server.getsockname()[1]


def listeners(port: int) -> Iterator[socket.socket]:
    """What this process listens on at a port, of IPv4 and IPv6; Linux alone tells."""
    for name in os.listdir("/proc/self/fd") if DEVICE else ():
        with contextlib.suppress(OSError):  # no longer open
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as found:
                at_port = found.family in (socket.AF_INET, socket.AF_INET6) and found.getsockname()[1] == port
                if at_port and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    yield found


def keep_on_loopback(port: int) -> bool:
    """Ties what this process listens on at a port to the loopback interface. Whether that worked: on Linux, which wants
    no right for it from 5.7 on."""
    found = False
    for listener in listeners(port):
        try:
            listener.setsockopt(socket.SOL_SOCKET, DEVICE, LOOPBACK)
        except OSError:
            return False
        found = True
    return found


def coordinator_options(address: str, index: int) -> dict[str, str]:
    """Of jax.distributed.initialize: process 0 listens on loopback where the processes meet there; else a line
    of process 0's says that it is open."""
    host, _, port = address.rpartition(":")
    if host == "localhost" or host.startswith("127.") or host == "[::1]":
        return {"coordinator_bind_address": address}
    if index == 0:
        tell_open("the coordinator", int(port))
    return {}


def tie_coordinator(port: int, count: int) -> None:
    """Once process 0 of a TPU slice listens: no other host has to reach it if there is none."""
    if count > 1 or not keep_on_loopback(port):
        tell_open("the coordinator", port)


def tell_open(what: str, port: int) -> None:
    print(
        f"{what} can be reached at port {port} of every network interface, without TLS or a token: let the network keep"
        " others out (docs/security.md)",
        file=sys.stderr,
        flush=True,
    )


def serve_profiler(port: int) -> None:
    """jax's profiler for this machine alone; where that cannot be had, a line says so."""
    import jax

    jax.profiler.start_server(port)
    if not keep_on_loopback(port):
        tell_open("the profiler", port)
