"""The paper's table by one command: check data, collect, SFT, GRPO, evaluate before and after, bounds, one page.

  python -m rsagent_jax.reproduce --config=configs/reproduce_7b.py --workdir=DIR [--config.refer=REFER …]
  python -m rsagent_jax.reproduce … --only=sft,eval-sft-refcoco-val      these stages, done or not
  python -m rsagent_jax.reproduce … --only=report                        none; the table of what is there

Every stage is a command of this project, run as a child process and printed, so that it can be run by hand as well.
Run the same command again and it goes on: a stage that is done is skipped, one that was stopped goes on from where its
own command had come. A stage that fails leaves its row of the table empty, and those that do not need it are run all
the same; the exit status is that of the first that failed. Leaves table.md, summary.json and report/index.html.
"""

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import json
import signal
import subprocess
import sys
import time
from collections.abc import Collection

from rsagent_jax.config.import_path import closest
from rsagent_jax.config.recipe import RecipeConfig, Step, plan_steps
from rsagent_jax.report.reproduction import STAMP, command_line, seconds_of, waits_for, write_report
from rsagent_jax.runtime.paths import write_whole
from rsagent_jax.types import DataError

REPORT = "report"  # of --only: no stage


def main(
    config: RecipeConfig,
    *,
    workdir: str = "",  # directory for everything this command leaves behind
    only: str = "",  # names of stages, with commas: these are run, done or not; report = none of them
) -> int:
    steps = plan_steps(config, command.make_workdir(workdir))
    wanted = chosen(only, steps)
    failed: dict[str, int] = {}
    for k, (name, step) in enumerate(steps.items(), start=1):
        head = f"== {k}/{len(steps)} {name}"
        if name not in wanted:
            continue
        if seconds_of(step) is not None and (step.stage.given or not only):
            print(f"{head}: done", flush=True)
        elif step.lacks or (not only and waits_for(step, steps, failed)):
            print(f"{head}: {waits_for(step, steps, failed)}", flush=True)
        else:
            print(f"{head}\n{command_line(step)}", flush=True)
            if status := run_step(step):
                failed[name] = status
                print(f"error: {name} failed with status {status}; again: {command_line(step)}", file=sys.stderr)
    print(f"== {REPORT}", flush=True)
    write_report(config.title, steps, command.make_workdir(workdir), failed)
    return next(iter(failed.values()), 0)


def chosen(only: str, steps: Collection[str]) -> set[str]:
    """The stages that --only names; all of them without it."""
    names = {name.strip() for name in only.split(",") if name.strip()}
    for name in sorted(names - {*steps, REPORT}):
        raise DataError(f"--only: there is no stage {name!r}{closest(name, steps)}; there are: {', '.join(steps)}")
    return names or {*steps}


def run_step(step: Step) -> int:
    """Runs the command and, if it ends well, says so in its directory. The exit status; 128 + n after signal n."""
    start = time.perf_counter() - (seconds_of(step) or 0.0)  # of a stage that is run anew, all of its time
    (step.directory / STAMP).unlink(missing_ok=True)
    with subprocess.Popen([sys.executable, *step.argv]) as child:
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            status = child.wait()
        except BaseException:  # nothing goes on behind the back of whoever stopped this
            child.terminate()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if status == 0:
        step.directory.mkdir(parents=True, exist_ok=True)
        stamp = {"command": command_line(step), "seconds": time.perf_counter() - start, "key": step.key}
        write_whole(step.directory / STAMP, json.dumps(stamp, indent=2) + "\n")
    return status if status >= 0 else 128 - status
