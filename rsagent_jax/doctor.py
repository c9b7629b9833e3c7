"""Is this machine fit for this config? One page of facts, measured here and now, within a few minutes.

  python -m rsagent_jax.doctor --config=configs/grpo_tpu.py --config.slice=v6e-8 [--workdir=DIR] [--config.a.b=v]

Looks at versions, devices and mesh, disk, hub and buckets; measures products and memory bandwidth; holds each attention
kernel against the plain one, log-probs in bf16 against fp32, of a device against the CPU and of the engine against the
trainer; compiles and times a training step; asks the segmenter for a mask that is known. Random weights of the config's
shape are used: nothing is downloaded or trained.

Each line is OK, slow, wrong (exit status 1) or not run, with the figure, what it is compared with, and what to do. The
last line of stdout is the same as JSON; with --workdir, doctor.json and doctor.html there have it as well.
On a slice start it on all hosts: the first prints one table of all of them, and a host far from their median is slow.
See docs/doctor.md.
"""

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import json
import sys
import time

from rsagent_jax.config.ranges import Positive
from rsagent_jax.config.schema import EvalConfig, SegmentConfig, TrainConfig
from rsagent_jax.fitness.checks import run_checks
from rsagent_jax.fitness.finding import Examined
from rsagent_jax.fitness.hosts import compare_hosts, gather_pages, pages_json, pages_table
from rsagent_jax.report.page import render_page
from rsagent_jax.runtime import processes
from rsagent_jax.runtime.paths import write_whole


def main(
    config: TrainConfig | EvalConfig | SegmentConfig,
    *,
    workdir: str = "",  # where the run would write: its disk is looked at, and doctor.json and doctor.html go there
    deadline_s: Positive = 600.0,  # of one check, compilation included; what takes longer is wrong
) -> int:
    start = time.perf_counter()
    processes.initialize_distributed()
    directory = command.make_workdir(workdir) if workdir else None
    if directory is not None:  # what is compiled here, train.py need not compile again
        command.use_compilation_cache(config.cache_dir, directory / "compiled")
    examined = Examined.of(config, directory)
    progress = lambda name: print(f"  {name} …", file=sys.stderr, flush=True)  # noqa: E731
    findings, hangs = run_checks(examined, deadline_s, progress)
    pages = compare_hosts(gather_pages(findings, 2 * deadline_s))
    result = pages_json(pages, time.perf_counter() - start)
    if processes.is_lead():
        counts = ", ".join(f"{count} {verdict}" for verdict, count in result["counts"].items())
        print(pages_table(pages))
        print(f"{counts}; {result['seconds']:.0f} s")
        if directory is not None:
            write_whole(directory / "doctor.json", json.dumps(result, indent=1) + "\n")
            write_whole(directory / "doctor.html", render_page("doctor.html", title=f"Doctor: {counts}", pages=pages))
        print(json.dumps(result), flush=True)
    status = 0 if result["ok"] else 1
    if hangs:  # its thread would hold the interpreter's end up
        command.leave_together(status)
    return status
