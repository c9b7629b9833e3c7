"""The table of checks. Another one is a file with a function of this kind, and a line here."""

import dataclasses
import gc
import threading
from collections.abc import Callable, Sequence

from rsagent_jax.config.import_path import first_line
from rsagent_jax.fitness import decoding, kernels, machine, parity, places, segmenting, speed, training
from rsagent_jax.fitness.finding import Examined, Finding, Verdict
from rsagent_jax.types import DataError

AFTER_A_HANG_S = 20.0  # of each later check: a wedged device stops them all, and the page has to come


@dataclasses.dataclass(frozen=True)
class Check:
    name: str
    run: Callable[[Examined], list[Finding]]
    remedy: str  # where it raises


_DEVICE = "see that nothing else uses the devices; restart the host; another jax or driver"
CHECKS = (  # the cheapest first
    Check("versions", machine.check_versions, "make setup-runtime"),
    Check("devices", machine.check_devices, "docs/tpu.md, Install on all hosts"),
    Check("mesh", machine.check_mesh, "change the config as the message says; docs/tpu.md, Choose a slice"),
    Check("disk", machine.check_space, "give a --workdir that can be written to"),
    Check("hub", places.check_hub, "accept its terms on its page, set HF_TOKEN; HF_ENDPOINT names the hub"),
    Check("bucket", places.check_buckets, "pip install gcsfs; the service account needs storage.objectAdmin on it"),
    Check("products", speed.check_matmul, _DEVICE),
    Check("memory bandwidth", speed.check_bandwidth, _DEVICE),
    Check("attention", kernels.check_kernels, "--config.policy.attention=blocks"),
    Check("numbers", parity.check_numbers, _DEVICE),
    Check("engine", decoding.check_engine, _DEVICE),
    Check("training step", training.check_training, _DEVICE),
    Check("segmenter", segmenting.check_masks, "python -m sam_bridge.check --address=…; docs/sidecar.md"),
)


def run_checks(
    examined: Examined, deadline_s: float, say: Callable[[str], None], checks: Sequence[Check] | None = None
) -> tuple[list[Finding], bool]:
    """All findings, and whether a check still hangs: Python cannot end it, so the process has to go with it.

    A check that raises, or takes longer than `deadline_s`, is a finding; the others go on. `say` hears each name;
    `checks` stand in the table's place.
    """
    findings, hangs = [], False
    for check in CHECKS if checks is None else checks:
        say(check.name)
        done: list[Finding] = []
        wait_s = min(deadline_s, AFTER_A_HANG_S) if hangs else deadline_s
        thread = threading.Thread(target=_run, args=(check, examined, done), daemon=True)
        thread.start()
        thread.join(wait_s)
        if thread.is_alive():
            hangs = True
            done = [
                Finding(check.name, Verdict.WRONG, f"no answer within {wait_s:.0f} s", "--deadline_s", check.remedy)
            ]
        earlier = {f.figure: f.name for f in findings if f.verdict is Verdict.WRONG}
        for f in done:  # a mesh that cannot be made stops many: it is said once
            once = f.verdict is not Verdict.WRONG or f.figure not in earlier
            findings.append(f if once else Finding(f.name, Verdict.NOT_RUN, f"for want of: {earlier[f.figure]}"))
    return findings, hangs


def _run(check: Check, examined: Examined, done: list[Finding]) -> None:
    try:
        done += check.run(examined)
    except Exception as error:  # noqa: BLE001  the page shall come, whatever is wrong
        figure = f"{type(error).__name__}: {first_line(error)}"
        remedy = "do as it says; else " * isinstance(error, DataError) + check.remedy
        done.append(Finding(check.name, Verdict.WRONG, figure, "", remedy))
    gc.collect()  # modules hold their arrays in circles, and the next check may need the memory
