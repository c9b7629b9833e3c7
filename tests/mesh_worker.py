"""One process of a training run on a mesh, started by tests/test_processes.py with its job as JSON.

Trains through train.run_stage as train.py does, with a tiny random policy, and lets the lead write the parameters.
"""

import contextlib
import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

import train
from rsagent_jax import processes, sharding
from rsagent_jax.config import (
    BatchConfig,
    GrpoConfig,
    LoraConfig,
    MeshConfig,
    OptimConfig,
    PolicyConfig,
    RewardGroup,
    RewardTerm,
    SftConfig,
    TrainConfig,
)
from rsagent_jax.metrics import MetricsLog


def config(stage: str, stored: str, mesh: dict, steps: int, small, rank: int, freeze: list[str]) -> TrainConfig:
    batch = BatchConfig(rows=8, tokens=400, patches=128)
    # Adam's sign of a gradient near zero is rounding; a large eps keeps it small.
    optim = OptimConfig(lr=1e-2, eps=1e-2, freeze=tuple(freeze))
    return TrainConfig(
        seed=3,
        stages=(stage,),
        policy=PolicyConfig(weights="", dtype="float32", remat="full", lora=LoraConfig(rank=rank)),
        agent=small.AGENT,
        mesh=MeshConfig(**mesh),
        sft=SftConfig(trajectories=stored, steps=steps, trajectories_per_step=6, batch=batch, optim=optim),
        grpo=GrpoConfig(
            steps=steps,
            prompts=4,
            group=2,
            kl=0.05,
            reward=(RewardGroup("words", 1.0, (RewardTerm("tests.rollout.small:word_count"),)),),
            batch=batch,
            optim=optim,
            sampling=dataclasses.replace(small.SAMPLING, context=400, slots=8),
        ),
    )


def main(job: dict) -> None:
    processes.join()
    from agent_fakes import DiscSegmenter

    from tests.rollout import small

    small.weights = lambda: pathlib.Path(job["weights"])  # the processes read one
    assert len(jax.devices()) == job["devices"], jax.devices()
    train.open_samples = lambda _: [small.sample(i, 56, 56) for i in range(5)]
    train.open_segmenter = lambda _: contextlib.nullcontext(DiscSegmenter())
    train.tqdm = lambda steps, **_: steps
    settings = config(job["stage"], job["stored"], job["mesh"], job["steps"], small, job["rank"], job["freeze"])
    mesh = sharding.make_mesh(settings.mesh)
    model = small.model()
    graphdef, params = nnx.split(model, nnx.Param)
    host = jax.tree.map(np.asarray, params)
    params = jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i]),
        host,
        sharding.param_shardings(model, mesh),
    )
    workdir = pathlib.Path(job["workdir"])
    workdir.mkdir(exist_ok=True)
    log = MetricsLog(processes.own_directory(workdir))
    with contextlib.ExitStack() as stack:
        args = (settings, workdir, log, mesh, graphdef, params, small.weights(), small.processor(), stack)
        out = train.run_stage(job["stage"], *args)
    log.close()
    whole = {
        jax.tree_util.keystr(path): np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        for path, leaf in jax.tree_util.tree_leaves_with_path(out)
    }
    if processes.is_lead():
        np.savez(job["out"], **whole)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
