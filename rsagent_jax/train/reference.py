"""The reference of the KL term: the policy that a stage began with. Every start reads it anew; it has to be the same.

    <workdir>/checkpoints/<stage>/reference.json     {"weights": …, "checksum": …}

With adapters the base is the reference, and is kept beside the checkpoints itself.
"""

import json
import pathlib

from flax import nnx

from rsagent_jax.models.qwen25_vl.config import read_json
from rsagent_jax.models.qwen25_vl.fingerprint import params_checksum
from rsagent_jax.models.qwen25_vl.load import pin_step
from rsagent_jax.runtime import processes
from rsagent_jax.runtime.paths import write_whole
from rsagent_jax.types import DataError

FILE = "reference.json"
ANEW = "or begin anew in another --workdir"


def check_reference(directory: pathlib.Path, params: nnx.State, weights: str, dtype: str, *, begins: bool) -> None:
    """Writes down which one it is where the stage `begins`. DataError, on all processes, where it is another than the
    stage in `directory` began with, or where nobody can tell.

    weights: what `params` were read from, as policy.weights has it; or the stage before in the same work directory.
    """
    now, file = {"weights": pin_step(weights), "checksum": params_checksum(params, dtype)}, directory / FILE
    if begins:
        processes.on_lead(lambda: write_whole(file, json.dumps(now, indent=2) + "\n"))
        return
    kept = processes.all_or_none(lambda: _read(file))
    if kept.get("checksum") != now["checksum"]:
        was, stage_before = kept.get("weights"), str(weights).startswith(f"{directory.parent}/")
        put_back = f"Put {was} back as it was" if stage_before else f"Give --config.policy.weights={was}"
        raise DataError(
            f"{directory}: the reference of the KL term has changed: {was} (checksum {kept.get('checksum')}) when the"
            f" stage began, {now['weights']} ({now['checksum']}) now. Nothing was touched. {put_back}, {ANEW}"
        )


def _read(file: pathlib.Path) -> dict[str, str]:
    if not file.exists():
        raise DataError(
            f"{file} is gone: nobody can tell whether the reference of the KL term is still the policy that the stage"
            f" began with. Put it back, {ANEW}"
        )
    return read_json(file)
