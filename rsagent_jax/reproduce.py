"""The paper's table by one command: check data, collect, SFT, GRPO, evaluate before and after, bounds, one page.

  python -m rsagent_jax.reproduce --config=configs/reproduce_7b.py --workdir=DIR [--config.refer=REFER …]
  python -m rsagent_jax.reproduce … --only=sft,eval-sft-refcoco-val      these stages, done or not
  python -m rsagent_jax.reproduce … --only=report                        none; the table of what is there

Every stage is a command of this project, run as a child process and printed, so that it can be run by hand as well.
Run the same command again and it goes on: a stage that is done is skipped, one that was stopped goes on from where its
own command had come. A stage that fails leaves its row of the table empty, and those that do not need it are run all
the same; the exit status is that of the first that failed. Leaves table.md, summary.json and report/index.html.

On a slice of several hosts, the same command on each of them, with one work directory that all share: train.py,
evaluate.py and collect run on all, everything else on the first. A stage that fails on one host ends on all.
"""

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import functools
import json
import pathlib
import sys
import time
import uuid
from collections.abc import Callable, Collection, Mapping

from rsagent_jax.config.import_path import closest
from rsagent_jax.config.recipe import RecipeConfig, Step, plan_steps
from rsagent_jax.report.reproduction import (
    STAMP,
    command_line,
    nonces_of,
    seconds_of,
    take_back,
    waits_for,
    write_report,
)
from rsagent_jax.runtime.hosts import Hosts, join_hosts, stopped_by_sigterm
from rsagent_jax.runtime.paths import make_directory, write_whole
from rsagent_jax.runtime.preemption import Preempted
from rsagent_jax.types import DataError

DONE = "done"
REPORT = "report"  # of --only: no stage
SHARED_S = 60  # until a host sees what another has written: NFS remembers for a while that a file was not there


def main(
    config: RecipeConfig,
    *,
    workdir: str = "",  # directory for everything this command leaves behind
    only: str = "",  # names of stages, with commas: these are run, done or not; report = none of them
) -> int:
    return run_recipe(config, workdir, only, functools.partial(write_report, config.title))


def run_recipe(
    config: RecipeConfig,
    workdir: str,
    only: str,
    write: Callable[[Mapping[str, Step], pathlib.Path, Mapping[str, int]], None],
) -> int:
    """Runs the stages on all hosts; then the first one writes what is there, of `write` (steps, directory, failed).

    workdir, only: as of the command. Returns its exit status: that of the first stage that failed, or 0.
    """
    with Hosts() if only == REPORT else join_hosts() as hosts, stopped_by_sigterm():
        directory = command.make_workdir(workdir)
        steps = plan_steps(config, directory)
        wanted = chosen(only, steps)
        hosts.check_same({"--workdir or --config": " ".join(step.key for step in steps.values()), "--only": only})
        if why := hosts.from_lead(lambda: nothing_to_run(steps, wanted)):
            raise DataError(why)
        failed = run_steps(steps, wanted, hosts, again=bool(only))
        print(f"== {REPORT}", flush=True)
        if hosts.is_lead:
            write(steps, directory, failed)
        hosts.from_lead(lambda: REPORT)
    return next(iter(failed.values()), 0)


def run_steps(steps: Mapping[str, Step], wanted: Collection[str], hosts: Hosts, again: bool) -> dict[str, int]:
    """Runs those that are wanted and not done; `again`: those that are done, too. The status of each that failed."""
    failed: dict[str, int] = {}
    waiting: dict[str, list[str]] = {}  # stages by what they wait for

    def stands(step: Step) -> str:
        """Why it is not run; "" where it is."""
        if seconds_of(step) is not None and (step.stage.given or not again):
            return DONE
        return waits_for(step, steps, failed) if step.lacks or not again else ""

    for k, (name, step) in enumerate(steps.items(), start=1):
        head = f"== {k}/{len(steps)} {name}"
        if name not in wanted:
            continue
        if why := hosts.from_lead(lambda step=step: stands(step)):
            if why == DONE:
                print(f"{head}: {why}", flush=True)
            else:
                waiting.setdefault(why, []).append(name)
            continue
        runs_here = hosts.is_lead or step.stage.everywhere
        print(f"{head}\n{command_line(step)}" if runs_here else f"{head}: runs on host 0", flush=True)
        if status := run_step(step, hosts):
            failed[name] = status
            print(f"error: {name} failed with status {status}; again: {command_line(step)}", file=sys.stderr)
    for why, names in waiting.items():
        print(f"== {', '.join(names)}: {why}", flush=True)
    return failed


def nothing_to_run(steps: Mapping[str, Step], wanted: Collection[str]) -> str:
    """What to give, where all stages that are wanted wait for fields that are empty; else ""."""
    blocked: set[str] = set()
    for name, step in steps.items():
        if seconds_of(step) is None and (step.lacks or not blocked.isdisjoint(step.needs)):
            blocked.add(name)
    asked = [name for name in steps if name in wanted]
    if not asked or not blocked.issuperset(asked):
        return ""
    lacking = sorted({f"--config.{field}" for name in blocked for field in steps[name].lacks})
    return f"nothing can be run: every stage waits for {', '.join(lacking)}, or for another one that does"


def chosen(only: str, steps: Collection[str]) -> set[str]:
    """The stages that --only names; all of them without it."""
    names = {name.strip() for name in only.split(",") if name.strip()}
    for name in sorted(names - {*steps, REPORT}):
        raise DataError(f"--only: there is no stage {name!r}{closest(name, steps)}; there are: {', '.join(steps)}")
    return names or {*steps}


def run_step(step: Step, hosts: Hosts) -> int:
    """Runs the command and, if it ends well, says so in its directory. The exit status, as `Hosts.run` has it.
    DataError on a host that does not find what another one has written."""
    start = time.perf_counter() - (seconds_of(step) or 0.0)  # of a stage that is run anew, all of its time
    stamp = {"command": command_line(step), "key": step.key, "nonce": uuid.uuid4().hex, "nonces": nonces_of(step)}
    if hosts.is_lead:
        take_back(step)
    status = hosts.run([sys.executable, *step.argv], step.stage.everywhere)
    if status == command.PREEMPTED:  # and this command with it
        raise Preempted("SIGTERM")
    if status:
        return status
    if hosts.is_lead:
        make_directory(step.directory)
        stamp |= {"seconds": time.perf_counter() - start}
        write_whole(step.directory / STAMP, json.dumps(stamp, indent=2) + "\n")
    hosts.from_lead(lambda: STAMP)
    until = time.monotonic() + SHARED_S
    while seconds_of(step) is None:
        if time.monotonic() < until:
            time.sleep(1)
            continue
        raise DataError(f"{step.directory / STAMP} of host 0 is not here: the hosts need one --workdir that they share")
    return 0
