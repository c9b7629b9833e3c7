"""Several processes of one program, as on the hosts of a slice: who holds which rows, and what all must agree on.

Every process issues the same compiled programs in the same order. With one process all of this is the identity.
"""

import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed  # its key-value store has no public name
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rsagent_jax.runtime import preemption, sharding
from rsagent_jax.runtime.hosts import HEARTBEAT_S, PORT, USUAL_PORT, VARIABLES, has_tpu, hold_place
from rsagent_jax.runtime.listening import coordinator_options, tie_coordinator
from rsagent_jax.runtime.paths import make_directory
from rsagent_jax.runtime.watchdog import WATCHDOG
from rsagent_jax.types import DataError

T = TypeVar("T")
_MEETINGS = itertools.count()  # of exchange, in the same order on every process
A_WEEK_MS = 7 * 24 * 3600 * 1000


def initialize_distributed(beside: int = 0, **options: Any) -> None:
    """Meets the other processes, before anything asks for devices. Does nothing where there are none. DataError where
    another process of this machine is there in its place.

    From then on a host that dies, hangs or fails ends the others (runtime/watchdog.py).

    On a TPU VM jax finds the other hosts of the slice itself; elsewhere VARIABLES say who is who: host:port, n, 0..n-1.
    beside: how many ports behind the usual one; options: of jax.distributed.initialize.
    """
    given = [os.environ.get(name) for name in VARIABLES]
    jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM to itself
    options = {"heartbeat_timeout_seconds": HEARTBEAT_S} | options
    if any(given):
        if not all(given) or not (given[1].isdigit() and given[2].isdigit() and int(given[2]) < int(given[1])):
            state = ", ".join(f"{name}={value or ''}" for name, value in zip(VARIABLES, given, strict=True))
            raise DataError(f"several processes need all of host:port, their number and one's own from 0: {state}")
        host, _, port = given[0].rpartition(":")
        if not port.isdigit():
            raise DataError(f"{VARIABLES[0]}={given[0]} is no host:port")
        hold_place(int(port) + beside, int(given[2]))
        address = f"{host}:{int(port) + beside}"
        listens = coordinator_options(address, int(given[2]))
        jax.distributed.initialize(address, int(given[1]), int(given[2]), **listens, **options)
    elif has_tpu():
        usual = os.environ.get(PORT)
        port = int(usual or USUAL_PORT) + beside
        hold_place(port, 0)
        os.environ[PORT] = str(port)
        try:
            jax.distributed.initialize(**options)
            if distributed.global_state.process_id == 0:
                tie_coordinator(port, distributed.global_state.num_processes)
        finally:  # children meet at the usual one
            os.environ.pop(PORT, None)
            os.environ.update({PORT: usual} if usual else {})
    if (state := distributed.global_state).client:
        if not beside:
            preemption.tell_others(state.client, state.process_id)
        if state.num_processes > 1:
            WATCHDOG.join(state.process_id, state.num_processes, state.client, state.coordinator_address)


def is_lead() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def own_directory(workdir: pathlib.Path) -> pathlib.Path:
    """Where this process keeps its log and examples: the lead in `workdir` itself, others beside them."""
    path = workdir if is_lead() else workdir / f"process_{jax.process_index()}"
    make_directory(path)
    return path


@dataclasses.dataclass(frozen=True)
class Share:
    """Part `index` of `count` equal parts of every batch."""

    index: int = 0
    count: int = 1

    def of(self, total: int, what: str) -> int:
        """How many of `total` come here; DataError unless they divide evenly."""
        if total % self.count:
            raise DataError(f"{what} = {total} must be a multiple of the {self.count} processes that share it")
        return total // self.count


def parse_share(text: str, what: str) -> Share:
    """ "2/8" -> Share(2, 8). DataError, naming `what`, unless 0 <= 2 < 8."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise DataError(f"{what}={text} must be i/n with 0 <= i < n, such as 0/4 for the first of four")
    return Share(int(index), int(count))


def own_share(text: str, what: str) -> Share:
    """Which part of the work is this process's: as `text` says, else as many as there are share it evenly. DataError
    for a text that is no i/n, and for one where the processes know of each other."""
    if not text:
        return Share(jax.process_index(), jax.process_count())
    if jax.process_count() > 1:
        raise DataError(
            f"{what}={text} is for machines that do not know of each other; the {jax.process_count()} processes of this"
            " slice share the work by themselves: leave it out"
        )
    return parse_share(text, what)


def tell_left(missing: int, what: str, share: Share, workdir: pathlib.Path) -> None:
    """That other shards have so many to do yet. DataError where there are none, or they are done: they are not here."""
    if distributed.global_state.client:
        raise DataError(
            f"{missing} {what} that other processes have done are not in {workdir}: the hosts of a slice need one work"
            " directory that all of them share"
        )
    if share.count == 1:
        raise DataError(f"{missing} {what} that were done are not in {workdir}: run the same command again, which does"
                        " them again")  # fmt: skip
    print(f"shard {share.index} of {share.count} is done; {missing} {what} are left to the others")


def row_share(mesh: Mesh) -> Share:
    """Which part of a batch's rows this process's devices hold. Processes of one tensor group hold the same part."""
    groups = mesh.devices.reshape(-1, mesh.shape["tensor"])
    held: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        for process in {d.process_index for d in group}:
            held.setdefault(process, []).append(i)
    n = len(held[jax.process_index()])
    if any(len(h) != n or h != list(range(h[0], h[0] + n)) or h[0] % n for h in held.values()) or len(groups) % n:
        raise DataError(
            f"mesh {dict(mesh.shape)}: processes hold the row groups {held}, not even parts;"
            " let mesh.tensor divide the devices of a process, or be a multiple of them"
        )
    return Share(held[jax.process_index()][0] // n, len(groups) // n)


def put_rows(tree: Any, mesh: Mesh) -> Any:
    """Host arrays with this process's rows -> global arrays over the mesh's rows."""
    where = sharding.rows(mesh)
    if jax.process_count() == 1:
        return jax.device_put(tree, where)
    count = row_share(mesh).count
    whole = lambda x: (x.shape[0] * count, *x.shape[1:])  # noqa: E731
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(where, np.asarray(x), whole(x)), tree)


def allgather_max(value: int) -> int:
    """The largest of all processes' values: how often all of them must issue a program."""
    return value if jax.process_count() == 1 else int(np.max(multihost_utils.process_allgather(np.int32(value))))


def allgather_sum(counts: Sequence[int]) -> list[int]:
    """Element by element the sum over all processes: what all of them decide by alike."""
    if jax.process_count() == 1:
        return list(counts)
    return np.sum(multihost_utils.process_allgather(np.asarray(counts, np.int32)), axis=0).tolist()


def all_or_none(check: Callable[[], T]) -> T:
    """What `check` returns, once it has passed on every process; a DataError on all where it fails on one, else
    Preempted on all where one is.

    Without it, those where it passes would go on and wait for the others. They wait here for as long as it takes, on
    the processes' own store: a collective of the CPU backend gives up after half a minute.
    """
    try:
        result, problem, state = check(), None, ""
    except DataError as error:
        result, problem, state = None, error, f"failed {error.status}"
    except preemption.Preempted as stop:
        result, problem, state = None, stop, stop.signal_name
    states = [said for said in exchange(state) if said]
    failed = [int(said.removeprefix("failed ")) for said in states if said.startswith("failed ")]
    if failed and not isinstance(problem, DataError):
        problem = DataError(f"{len(failed)} of {jax.process_count()} processes failed; what they said is in their logs")
        problem.status = min(failed)  # 2, of a mistake, before one that another start may mend
    if problem is not None:
        raise problem
    if states:
        raise preemption.Preempted(states[0])
    return result


def on_lead(work: Callable[[], Any]) -> None:
    """Done by the lead for all of them; what fails there fails everywhere."""
    all_or_none(work if is_lead() else lambda: None)


def exchange(value: Any) -> list[Any]:
    """The JSON values that all processes say, the lead's first, once all have said theirs; outside of the devices."""
    text = json.dumps(value)
    if jax.process_count() == 1:
        return [json.loads(text)]
    store, own, meeting = distributed.global_state.client, jax.process_index(), next(_MEETINGS)
    name = "rsagent_jax/exchange/{}/{}".format
    store.key_value_set(name(meeting, own), text)
    said = [store.blocking_key_value_get(name(meeting, i), A_WEEK_MS) for i in range(jax.process_count())]
    if meeting:  # who has spoken here has read all of the meeting before
        store.key_value_delete(name(meeting - 1, own))
    return list(map(json.loads, said))


def check_same(values: dict[str, str]) -> None:
    """DataError, on every process, that names what is not the same on all of them."""
    said = exchange(values)
    for name in values:
        if len(found := {one.get(name) for one in said}) > 1:
            raise DataError(
                f"{name} is not the same on all {len(said)} hosts ({', '.join(map(str, sorted(found, key=str)))}): give"
                " them the same files; a name on a hub with its revision, org/name@revision"
            )


def local_mesh(tensor: int, rows: int) -> Mesh | None:
    """This process's devices, `tensor` of them to a row, and at most `rows` of these; None for a single device. For
    programs that it runs alone."""
    mine = sorted(jax.local_devices(), key=lambda d: d.id)
    if tensor < 1 or len(mine) % tensor:
        raise DataError(f"sampling.tensor = {tensor} must divide the {len(mine)} devices of a process")
    mine = mine[: tensor * rows]
    return None if len(mine) == 1 else Mesh(np.array(mine).reshape(-1, 1, tensor), sharding.AXES)


def local_copy(params: Any, mesh: Mesh, dtype: str) -> Any:
    """The same parameters, whole inside every process: split over its own devices, for programs it runs alone.

    One resharding over the interconnect, in `dtype`.
    """
    flat = sorted(mesh.devices.flat, key=lambda d: (d.process_index, d.id))
    mine = [d for d in flat if d.process_index == jax.process_index()]
    both = Mesh(np.array(flat).reshape(-1, len(mine)), ("host", "chip"))
    here = Mesh(np.array(mine), ("chip",))
    specs = jax.tree.map(lambda p: split_once(p.shape, len(mine)), params)
    target = jax.tree.map(lambda s: NamedSharding(both, s), specs, is_leaf=lambda s: isinstance(s, P))
    spread = jax.jit(_cast, static_argnames="dtype", out_shardings=target)(params, dtype=dtype)  # before they travel

    def gather(array, spec):
        shards = [s.data for s in array.addressable_shards]
        return jax.make_array_from_single_device_arrays(array.shape, NamedSharding(here, spec), shards)

    return jax.tree.map(gather, spread, specs)


def _cast(tree: Any, *, dtype: str) -> Any:
    """Named, and not a lambda of the call: jax finds what it compiled for a function by the function."""
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def split_once(shape: tuple[int, ...], parts: int) -> P:
    """How a local copy lies: the longest axis that divides goes over the process's devices, the mesh axis "chip"."""
    sizes = [(n, i) for i, n in enumerate(shape) if n % parts == 0]
    if not sizes:
        return P()
    axis = max(sizes)[1]
    return P(*(None,) * axis, "chip")
