"""The reference of the KL term: the policy that a stage began with. Every start reads it anew; it has to be the same.

    <workdir>/checkpoints/<stage>/reference.json     {"weights": …, "checksum": …}

With adapters the base is the reference, and is kept beside the checkpoints itself.
"""

import json
import pathlib

import orbax.checkpoint as ocp
from flax import nnx

from rsagent_jax.models.qwen25_vl.config import read_json
from rsagent_jax.models.qwen25_vl.fingerprint import params_checksum
from rsagent_jax.models.qwen25_vl.load import local_weights
from rsagent_jax.models.qwen25_vl.steps import find_step, split_step
from rsagent_jax.runtime import processes
from rsagent_jax.runtime.paths import write_whole
from rsagent_jax.types import DataError

FILE = "reference.json"


def check_reference(directory: pathlib.Path, params: nnx.State, weights: str, dtype: str, *, begins: bool) -> None:
    """Writes down which one it is where the stage `begins`, and where an earlier version did not. DataError, on all
    processes, where it is another than the stage in `directory` began with.

    weights: what `params` were read from, as policy.weights has it.
    """
    now, file = {"weights": _with_step(weights), "checksum": params_checksum(params, dtype)}, directory / FILE
    kept = processes.all_or_none(lambda: None if begins or not file.exists() else read_json(file))
    if kept is None:
        write = lambda: write_whole(file, json.dumps(now, indent=2) + "\n")  # noqa: E731
        processes.all_or_none(write if processes.is_lead() else lambda: None)
    if kept is not None and kept.get("checksum") != now["checksum"]:
        raise DataError(
            f"{directory}: the reference of the KL term has changed: {kept.get('weights')} (checksum"
            f" {kept.get('checksum')}) when the stage began, {now['weights']} ({now['checksum']}) now. Nothing was"
            f" touched. Put the former back and give --config.policy.weights={kept.get('weights')}, or begin anew in"
            " another --workdir"
        )


def _with_step(weights: str) -> str:
    path, (name, step) = local_weights(weights), split_step(weights)
    return f"{name}@{find_step(path, step)}" if path.exists() and ocp.utils.checkpoint_steps(path) else weights
