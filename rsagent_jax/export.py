"""A policy -> a Hugging Face directory that transformers, vLLM and this project read.

  python -m rsagent_jax.export --checkpoint=runs/quickstart/train/checkpoints/grpo --out=HF_DIR [--dtype=float32]
      [--max_shard_gb=5] [--license=apache-2.0] [--evaluation=runs/quickstart/eval-grpo,DIR]

--checkpoint is a stage of train.py (its newest step; @best or @STEP names another) or a Hugging Face directory. The
dtype is the one that its config.json names; training keeps fp32 parameters, so anything narrower rounds them. Weights
of more than --max_shard_gb (10^9 bytes each) are split into shards with an index, as on the hub. Beside them lie the
chat template, what servers go by (docs/serving.md), and a model card, README.md: it tells of the run that the
checkpoint lies in, and of the evaluations of these very weights that lie beside it or are given.
"""

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any, Literal

from rsagent_jax.config.ranges import Positive
from rsagent_jax.data.serving import write_serving_files
from rsagent_jax.models.qwen25_vl import convert, tensor_files
from rsagent_jax.models.qwen25_vl.config import read_json
from rsagent_jax.models.qwen25_vl.load import copy_policy_files, load_policy, pin_step, policy_directory
from rsagent_jax.report.model_card import model_card
from rsagent_jax.runtime.local_copies import local_directory
from rsagent_jax.runtime.paths import is_remote, storage_kind, write_whole
from rsagent_jax.types import DataError
from sam_bridge.hub import sha256_of


def export(
    checkpoint: str,
    out: pathlib.Path,
    dtype: str | None = None,
    max_shard_gb: float = 5.0,
    licence: str = "",
    evaluations: Sequence[str] = (),
) -> str:
    """Writes the directory, whole or not at all, and says what it holds: one line, and one per shard if several."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not an empty directory; choose another --out")
    checkpoint = pin_step(checkpoint)  # the card is to be of the step that is written
    source = policy_directory(checkpoint)
    raw = read_json(source / "config.json")
    if dtype is not None:
        raw = with_dtype(raw, dtype)
    written = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    card = model_card(checkpoint, out.name, written, licence, evaluations)
    model = load_policy(checkpoint)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as private:
            partial = pathlib.Path(private) / out.name  # as the user's umask has it
            copy_policy_files(source, partial)
            write_serving_files(source, partial)
            write_whole(partial / "README.md", card)
            convert.save_model(model, partial, raw, int(max_shard_gb * 10**9))
            os.replace(partial, out)
        files, _ = tensor_files.find(out)
        count = sum(len(tensor_files.safetensors_header(file)) for file in files)
        digests = [f"{file.stat().st_size} bytes, sha256 {sha256_of(file)} ({file.name})" for file in files]
    except OSError as error:
        raise storage_kind(error)(f"{out} cannot be written: {error.strerror or error}") from error
    if len(files) == 1:
        return f"{out}: {count} tensors, {written}, {digests[0]}"
    total = sum(file.stat().st_size for file in files)
    return "\n  ".join([f"{out}: {count} tensors, {written}, {total} bytes in {len(files)} shards", *digests])


def with_dtype(raw: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json with its dtype replaced, in the nested configs of transformers 5 as well."""

    def replaced(values: dict[str, Any]) -> dict[str, Any]:
        return values | {key: dtype for key in ("dtype", "torch_dtype") if key in values}

    nested = {key: replaced(raw[key]) for key in ("text_config", "vision_config") if isinstance(raw.get(key), dict)}
    return {"torch_dtype": dtype} | replaced(raw) | nested


def main(
    *,
    checkpoint: str,  # checkpoints/<stage>[@best|@STEP], or a Hugging Face directory
    out: pathlib.Path,  # directory to make
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,  # instead of the one in config.json
    max_shard_gb: Positive = 5.0,  # 10^9 bytes per file at most
    license: str = "",  # for the model card: an identifier of the hub's; "" = as far as the base's is known
    evaluation: str = "",  # for the model card: work directories of evaluate.py, with commas
) -> None:
    if is_remote(out) and out.exists():
        raise DataError(f"{out} exists; choose another --out")
    with local_directory(out) as here:
        said = export(checkpoint, here, dtype, max_shard_gb, license, list(filter(None, evaluation.split(","))))
    print(said.replace(str(here), str(out)))
