"""Checkpoints of a stage: Orbax, asynchronous. State and the batch source's position; and how to use them later.

<workdir>/checkpoints/<stage>/policy/      config.json, tokenizer and image settings, copied from the weights
<workdir>/checkpoints/<stage>/base/        what the stage does not train (LoRA, frozen parts): arrays, written once
<workdir>/checkpoints/<stage>/<step>/      arrays of what it trains and of the optimiser; source.json; lora.json

So a stage's directory is a whole policy wherever the weights it started from have gone, and a step costs no more disk
than what is trained. Whoever loads the policy gets adapters merged.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from rsagent_jax import sharding
from rsagent_jax.config import LoraConfig
from rsagent_jax.models.qwen25_vl import convert, lora
from rsagent_jax.models.qwen25_vl.config import load_config
from rsagent_jax.models.qwen25_vl.model import Qwen25VL
from rsagent_jax.train.state import EMPTY, TrainState
from rsagent_jax.types import DataError

POLICY_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",  # transformers 5 saves image settings there
    "video_preprocessor_config.json",
    "special_tokens_map.json",  # these four beside tokenizer.json by transformers 4
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
)
NO_ADAPTERS = LoraConfig()


class Checkpoints:
    """One stage's checkpoints; the newest two are kept."""

    def __init__(self, directory: pathlib.Path, weights: pathlib.Path, adapters: LoraConfig = NO_ADAPTERS):
        self.directory = directory.absolute()
        self.adapters = {"rank": adapters.rank, "alpha": adapters.alpha} if adapters.rank else None
        self.has_base = False  # the one on disk is that of this run
        copy_policy_files(weights, self.directory / "policy")
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
        self.manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, state: TrainState, source: dict[str, Any], base: nnx.State = EMPTY) -> None:
        """Starts writing in the background. The stage's first save writes the base as well, and waits for that."""
        if jax.tree.leaves(base) and not self.has_base:
            with ocp.StandardCheckpointer() as writer:  # over one that no finished step belongs to
                writer.save(self.directory / "base", convert.flat_state(base), force=True)
            self.has_base = True
        args = {name: ocp.args.StandardSave(tree) for name, tree in _trees(state).items()}
        if self.adapters:
            args["lora"] = ocp.args.JsonSave(self.adapters)
        self.manager.save(int(state.step), args=ocp.args.Composite(source=ocp.args.JsonSave(source), **args))

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest state with the shapes and shardings of `like`, and the source's position; None without one."""
        step = self.manager.latest_step()
        if step is None:
            return None
        trees = jax.tree.map(_abstract, _trees(like))
        args = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
        if self.adapters:
            args["lora"] = ocp.args.JsonRestore()
        try:
            restored = self.manager.restore(step, args=ocp.args.Composite(source=ocp.args.JsonRestore(), **args))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.directory}/{step} does not fit the model and optimiser of this config ({_first_line(error)});"
                " use another --workdir, or the config it was made with"
            ) from error
        if self.adapters and restored["lora"] != self.adapters:
            raise DataError(
                f"{self.directory}/{step} has adapters with {restored['lora']}, this config has {self.adapters};"
                " use another --workdir, or the config it was made with"
            )
        leaves = [*restored["params"].values(), *restored["optimizer"].values()]
        order = [*trees["params"], *trees["optimizer"]]
        by_name = dict(zip([*restored["params"], *restored["optimizer"]], leaves, strict=True))
        params, rest = order[: len(trees["params"])], order[len(trees["params"]) :]
        state = TrainState(
            step=by_name[rest[0]],
            params=jax.tree.unflatten(jax.tree.structure(like.params), [by_name[n] for n in params]),
            opt_state=jax.tree.unflatten(jax.tree.structure(like.opt_state), [by_name[n] for n in rest[1:]]),
        )
        return state, restored["source"]

    def restore_base(self, like: nnx.State) -> nnx.State:
        """The base that the stage started with, where that of `like` is: the weights may not be the same any more."""
        if not jax.tree.leaves(like):
            return like
        tree = convert.flat_state(like)
        try:
            with ocp.StandardCheckpointer() as reader:
                values = reader.restore(self.directory / "base", jax.tree.map(_abstract, tree))
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise DataError(
                f"{self.directory}/base does not fit the parameters that this config leaves untrained"
                f" ({_first_line(error)}); use another --workdir, or the config it was made with"
            ) from error
        self.has_base = True
        return convert.with_values(like, values)

    def close(self) -> None:
        self.manager.wait_until_finished()
        self.manager.close()


def _trees(state: TrainState) -> dict[str, dict[str, jax.Array]]:
    """The state as plain dicts, so that files do not depend on the version of flax or optax."""
    rest = [state.step, *jax.tree.leaves(state.opt_state)]
    return {
        "params": {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state.params)},
        "optimizer": {f"leaf_{i:05d}": leaf for i, leaf in enumerate(rest)},
    }


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def copy_policy_files(weights: pathlib.Path, target: pathlib.Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in POLICY_FILES:
        if (weights / name).exists():
            shutil.copyfile(weights / name, target / name)
        else:  # of other weights: image settings in two files would contradict each other
            (target / name).unlink(missing_ok=True)


def policy_directory(weights: str) -> pathlib.Path:
    """Where config.json, tokenizer and image settings are: the Hugging Face directory, or a checkpoint's `policy/`.

    What the directory itself holds decides, whatever else is in it or beside it: config.json and weights make a Hugging
    Face directory (train.py writes a config.json of its own into a workdir), then `policy/config.json` a stage. Only
    for one that is neither is it asked whether a workdir or a step was given in place of a stage.
    """
    path = pathlib.Path(weights)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise DataError(f"{path} {what}; give a Hugging Face directory or checkpoints/<stage> of train.py")
    if (path / "config.json").exists() and any(path.glob("*.safetensors*")):
        return path
    if (path / "policy" / "config.json").exists():
        return path / "policy"
    if any(path.glob("checkpoints/*/policy/config.json")):
        raise DataError(f"{path} holds no weights itself; give {path}/checkpoints/<stage>")
    if path.name.isdigit() and (path.parent / "policy" / "config.json").exists():
        raise DataError(f"{path} holds no weights itself; give {path.parent}")
    return path


def load_policy(weights: str, mesh: Mesh | None = None) -> Qwen25VL:
    """The model of a Hugging Face directory, or of the newest checkpoint of a stage, with fp32 parameters.

    With a mesh each process reads what its own devices hold (sharding.param_shardings); without one everything goes to
    the default device.
    """
    path, config = pathlib.Path(weights), load_config(policy_directory(weights))
    model = convert.abstract_model(config)
    shardings = None if mesh is None else sharding.param_shardings(model, mesh)
    if policy_directory(weights) == path:
        return convert.load_model(path, config, shardings)
    options = ocp.CheckpointManagerOptions(create=False)  # nothing is written; read_only=True would warn that it is
    with ocp.CheckpointManager(path.absolute(), options=options) as manager:
        step = manager.latest_step()
        if step is None:
            raise DataError(f"{path} holds no finished checkpoint; run train.py until one is saved")
        wanted = convert.flat_params(model)
        # Orbax would ask for the devices that saved the checkpoint: always say where the arrays are to go.
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = dict.fromkeys(wanted, here) if shardings is None else convert.flat_state(shardings)
        elsewhere = here if mesh is None else sharding.replicated(mesh)  # adapters are small
        values: dict[str, jax.Array] = {}
        try:
            for part in (path / str(step) / "params", path / "base"):
                if part.exists():
                    values |= _read(part.absolute(), lambda name: places.get(name, elsewhere))
            adapters = {name: values.pop(name) for name in list(values) if name.endswith((".lora_a", ".lora_b"))}
            if {n: v.shape for n, v in values.items()} != {n: v.shape for n, v in wanted.items()}:
                raise ValueError("other parameters, or other shapes")
            if adapters:
                said = manager.restore(step, args=ocp.args.Composite(lora=ocp.args.JsonRestore()))["lora"]
                merge = functools.partial(lora.merge, scale=said["alpha"] / said["rank"], dtype=jnp.float32)
                values = jax.jit(merge, donate_argnums=0, out_shardings=places)(values, adapters)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise DataError(f"{path}/{step} is not of the model in {path}/policy ({_first_line(error)})") from error
    return convert.with_params(model, values)


def _read(directory: pathlib.Path, place: Callable[[str], jax.sharding.Sharding]) -> dict[str, jax.Array]:
    """The arrays saved in `directory`, by name, as fp32 where `place` says."""
    # The handler itself: a Checkpointer warns of metadata that a part of a step does not have.
    with contextlib.closing(ocp.StandardCheckpointHandler()) as reader:
        found = reader.metadata(directory).tree
        like = {n: jax.ShapeDtypeStruct(v.shape, jnp.float32, sharding=place(n)) for n, v in found.items()}
        return reader.restore(directory, args=ocp.args.StandardRestore(like))


def weights_checksum(model: nnx.Module) -> str:
    """sha256 over names, shapes and values: two runs with the same figure had the same weights."""
    digest = hashlib.sha256()
    for name, value in sorted(convert.flat_params(model).items()):
        array = np.asarray(value)
        digest.update(f"{name} {array.dtype} {array.shape} ".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
