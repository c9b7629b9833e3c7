"""One process of a training run on a mesh, started by tests/test_processes.py with its job as JSON.

Trains through train.run_stage as train.py does, with a tiny random policy, and lets the lead write the parameters. With
`delays` the environment hears scripts, every process's tools take their own time, and each writes what it has played;
those that take some, of process 0, begin once process 1 has played the step.
With `stop` = i process i gets SIGTERM in the rollout of the second step, at its second tool call.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import signal
import sys
import time

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

import train
from rsagent_jax.config.alarms import AlarmsConfig
from rsagent_jax.config.schema import LoraConfig, MeshConfig, OptimConfig, TrainConfig
from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.rollout import driver
from rsagent_jax.runtime import preemption, processes, sharding
from rsagent_jax.runtime.train_log import MetricsLog


def config(stage: str, stored: str, mesh: dict, steps: int, small, rank: int, freeze: list[str]) -> TrainConfig:
    # Adam's sign of a gradient near zero is rounding; a large eps keeps it small.
    optim = OptimConfig(lr=1e-2, eps=1e-2, freeze=tuple(freeze))
    few_programs = dict(context=240, prefill=16, slots=8)
    base = small.train_config(stored, 4, 8, optim, steps, sampling=few_programs, mask_overlong=False)
    return dataclasses.replace(
        base,
        stages=(stage,),
        policy=dataclasses.replace(base.policy, weights="", remat="full", lora=LoraConfig(rank=rank)),
        # A context this short would end most trajectories in an announced last turn, which is masked by default.
        agent=dataclasses.replace(small.AGENT, announce_last=False),
        mesh=MeshConfig(**mesh),
        sft=dataclasses.replace(base.sft, trajectories_per_step=6),
    )


def with_tools(delay_s: float, played: pathlib.Path, small, stop: bool, other: pathlib.Path | None) -> None:
    """Lets train.py's driver play scripts with a segmenter that takes `delay_s`, and keep what it has played. other:
    what a process keeps that has to have played the step before."""
    calls = []

    class Segmenter(small.IdleSegmenter if other else small.SlowSegmenter):
        def segment(self, image, request):
            calls.extend([1] * (len(steps) == 1))
            if stop and len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            while other and not other.with_suffix(f".{len(steps)}").exists():
                time.sleep(0.01)
            return super().segment(image, request)

    scripts = {f"s{i}": (*(small.click(20 + i + n, 30) for n in range(1 + i % 2)), small.finish(1)) for i in range(5)}
    compiled, steps = small.count_compiles(), []

    class Kept(small.EchoDriver):
        def run(self, tasks, *kept):
            before = len(compiled)
            out = super().run(tasks, *kept)
            kept = [
                dict(uid=k.uid, turns=len(t.turns), tokens=t.tokens.tolist(), logprobs=t.logprobs.tolist())
                for k, (t, _) in zip(tasks, out, strict=True)
            ]
            steps.append(dict(compiled=before, trajectories=kept))
            played.write_text(json.dumps(steps))
            played.with_suffix(f".{len(steps) - 1}").touch()
            return out

    train.Driver = functools.partial(Kept, script=small.scripted(scripts))
    segmenter = Segmenter(delay_s, (56, 56))
    driver.Jobs = segmenter.jobs if other else driver.Jobs
    train.open_segmenter = lambda _: contextlib.nullcontext(segmenter)


def run_stage(
    stage: str, config: TrainConfig, workdir: pathlib.Path, log: MetricsLog, values=None, replay: str = ""
) -> nnx.State:
    """The parameters with which a stage ends that begins with those of small.model(), or with `values` by name."""
    from tests.rollout import small

    mesh, model = sharding.make_mesh(config.mesh), small.model()
    graphdef, params = small.split(model)
    host = jax.tree.map(np.asarray, params if values is None else convert.with_values(params, values))
    put = lambda x, where: jax.make_array_from_callback(x.shape, where, lambda i: x[i])  # noqa: E731
    params = jax.tree.map(put, host, sharding.param_shardings(model, mesh))
    with contextlib.ExitStack() as stack:
        policy = train.Policy(small.weights(), small.processor(), mesh, graphdef, params)
        return train.run_stage(stage, config, workdir, log, policy, stack, replay).params


def main(job: dict) -> None:
    processes.initialize_distributed()
    from agent_fakes import DiscSegmenter

    from tests.rollout import small

    small.weights = lambda: pathlib.Path(job["weights"])  # the processes read one
    assert len(jax.devices()) == job["devices"], jax.devices()
    train.open_samples = lambda _: [small.sample(i, 56, 56) for i in range(5)]
    train.open_segmenter = lambda _: contextlib.nullcontext(DiscSegmenter())
    train.tqdm = lambda steps, **_: steps
    settings = config(job["stage"], job["stored"], job["mesh"], job["steps"], small, job["rank"], job["freeze"])
    workdir = pathlib.Path(job["workdir"])
    workdir.mkdir(exist_ok=True)
    if job["delays"]:
        index, delay_s = jax.process_index(), job["delays"][jax.process_index()]
        other = workdir / "played_1.json" if delay_s and job["stop"] is None else None
        with_tools(delay_s, workdir / f"played_{index}.json", small, job["stop"] == index, other)
    log = MetricsLog(processes.own_directory(workdir))
    grpo = dataclasses.replace(settings.grpo, **job["grpo"])
    settings = dataclasses.replace(settings, grpo=grpo, alarms=AlarmsConfig(steps=1))
    out = run_stage(job["stage"], settings, workdir, log)
    log.close()
    whole = {
        jax.tree_util.keystr(path): np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        for path, leaf in jax.tree_util.tree_leaves_with_path(out)
    }
    if processes.is_lead():
        np.savez(job["out"], **whole)


if __name__ == "__main__":
    try:
        with preemption.listening():
            main(json.loads(sys.argv[1]))
    except preemption.Preempted as stopped:
        print(stopped.kept)
        sys.exit(75)
