"""Opens a policy: a Hugging Face directory, here or on a hub, or a checkpoint of a stage, adapters merged."""

import contextlib
import functools
import hashlib
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from rsagent_jax.config.import_path import first_line
from rsagent_jax.models.qwen25_vl import convert, lora, tensor_files
from rsagent_jax.models.qwen25_vl.config import load_config
from rsagent_jax.models.qwen25_vl.model import Qwen25VL
from rsagent_jax.models.qwen25_vl.steps import find_step, split_step
from rsagent_jax.runtime import checksums, local_copies, paths, processes, sharding
from rsagent_jax.types import DataError
from sam_bridge import hub

# transformers 5 saves image settings in processor_config.json; 4 has the last four beside tokenizer.json.
POLICY_FILES = """config.json tokenizer.json tokenizer_config.json preprocessor_config.json processor_config.json
    video_preprocessor_config.json chat_template.json chat_template.jinja generation_config.json
    special_tokens_map.json added_tokens.json vocab.json merges.txt""".split()


def copy_policy_files(weights: pathlib.Path, target: pathlib.Path) -> None:
    paths.make_directory(target)
    for name in POLICY_FILES:
        if (weights / name).exists():
            paths.write_whole(target / name, (weights / name).read_bytes())
        else:  # of other weights: image settings in two files would contradict each other
            paths.remove_file(target / name)


@functools.cache
def local_weights(weights: str, more: tuple[str, ...] = ("*.safetensors", tensor_files.INDEX)) -> pathlib.Path:
    """The directory that `weights` names: itself, or where the files of a hub's `org/name[@revision]` have been put, or
    those of a Hugging Face directory in a bucket. A stage's checkpoints are read from the bucket itself; which step of
    them is meant (@best) is left out."""
    weights, _ = split_step(weights)
    if paths.is_remote(weights):
        path = paths.open_path(weights)
        is_hugging_face = (path / "config.json").exists() and any(path.glob("*.safetensors*"))
        return local_copies.fetch_folder(path, (*POLICY_FILES, *more)) if is_hugging_face else path
    if not hub.is_repository(weights):
        return pathlib.Path(weights)
    try:
        return hub.download(weights, (*POLICY_FILES, *more))
    except hub.HubError as error:
        raise DataError(f"weights: {error}") from error


def pin_step(weights: str) -> str:
    """The same with the step that a stage's name means now (runs/x/checkpoints/grpo@120), on every process the lead's:
    a training that goes on may save another one before the weights are read. DataError without such a step."""
    if not weights or hub.is_repository(weights):
        return weights

    def pinned() -> str:
        path, (name, step) = local_weights(weights, ()), split_step(weights)
        is_stage = path.is_dir() and ocp.utils.checkpoint_steps(path) and not (path / "config.json").exists()
        return f"{name}@{find_step(path, step)}" if is_stage else weights

    return processes.exchange(processes.all_or_none(pinned))[0]


def processor_directory(name: str) -> pathlib.Path:
    """Where config.json, tokenizer and image settings are, when nothing else is wanted: of a hub or of a Hugging Face
    directory in a bucket these files alone are fetched."""
    path = local_weights(name, ())
    fetched = hub.is_repository(name) or (paths.is_remote(name) and not paths.is_remote(path))
    return path if fetched else policy_directory(name)


def policy_directory(weights: str) -> pathlib.Path:
    """Where config.json, tokenizer and image settings are: the Hugging Face directory, or a checkpoint's `policy/`.

    What the directory itself holds decides, whatever else is in it or beside it: config.json and weights make a Hugging
    Face directory (train.py writes a config.json of its own into a workdir), then `policy/config.json` a stage. Only
    for one that is neither is it asked whether a workdir or a step was given in place of a stage.
    """
    path = local_weights(weights)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise DataError(
            f"{path} {what}; give a Hugging Face directory, a hub's org/name, or checkpoints/<stage> of train.py"
        )
    if (path / "config.json").exists() and any(path.glob("*.safetensors*")):
        if split_step(weights)[0] != str(weights):
            raise DataError(f"{weights}: {path} is a Hugging Face directory, which has no steps; leave the @ out")
        return path
    if (path / "policy" / "config.json").exists():
        return local_copies.fetch_folder(path / "policy")
    if any(path.glob("checkpoints/*/policy/config.json")):
        raise DataError(f"{path} holds no weights itself; give {path}/checkpoints/<stage>")
    if path.name.isdigit() and (path.parent / "policy" / "config.json").exists():
        raise DataError(f"{path} holds no weights itself; give {path.parent}")
    return path


def load_policy(weights: str, mesh: Mesh | None = None, dtype: str = "float32") -> Qwen25VL:
    """The model of a Hugging Face directory, or of a checkpoint of a stage, with parameters of `dtype`. Of a stage it
    is the newest, or the one that steps.py reads off its name.

    With a mesh each process reads what its own devices hold (sharding.param_shardings), and no device ever holds more
    than its shards; without one everything goes to the default device. Values are rounded once, merged adapters after
    the sum.
    """
    path, config = local_weights(weights), load_config(policy_directory(weights))
    model = convert.abstract_model(config)
    shardings = None if mesh is None else sharding.param_shardings(model, mesh)
    if policy_directory(weights) == path:
        return convert.load_model(path, config, shardings, jnp.dtype(dtype))
    options = ocp.CheckpointManagerOptions(create=False)  # nothing is written; read_only=True would warn that it is
    with ocp.CheckpointManager(paths.absolute(path), options=options) as manager:
        step = find_step(path, split_step(weights)[1])
        _refuse_damaged(path, step)
        wanted = convert.flat_params(model)
        # Orbax would ask for the devices that saved the checkpoint: always say where the arrays are to go.
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = dict.fromkeys(wanted, here) if shardings is None else convert.flat_state(shardings)
        elsewhere = here if mesh is None else sharding.replicated(mesh)  # adapters are small
        values: dict[str, jax.Array] = {}
        try:
            for part in (path / str(step) / "params", path / "base"):
                if part.exists():
                    exact = {name.replace(".lora_a", ".kernel") for name in values}  # what adapters are added to
                    values |= _read(paths.absolute(part), lambda name: places.get(name, elsewhere), dtype, exact)
            adapters = {name: values.pop(name) for name in list(values) if name.endswith((".lora_a", ".lora_b"))}
            if {n: v.shape for n, v in values.items()} != {n: v.shape for n, v in wanted.items()}:
                gone = values.keys() < wanted.keys() and not (path / "base").exists()
                raise ValueError("base/ is gone" if gone else "other parameters, or other shapes")
            if adapters:
                said = manager.restore(step, args=ocp.args.Composite(lora=ocp.args.JsonRestore()))["lora"]
                scale = said["alpha"] / said["rank"]
                merge = functools.partial(lora.merge_adapters, scale=scale, dtype=jnp.dtype(dtype))
                values = jax.jit(merge, donate_argnums=0, out_shardings=places)(values, adapters)
        except (ValueError, KeyError, TypeError, OSError) as error:
            if paths.bucket_problem(error):
                raise
            raise DataError(f"{path}/{step} is not of the model in {path}/policy ({first_line(error)})") from error
    return convert.with_params(model, values)


def _refuse_damaged(path: pathlib.Path, step: int) -> None:
    """DataError where the files that a policy is read from are not as they were written."""
    if damage := checksums.find_damage(path / str(step), "params/"):
        others = sorted(set(ocp.utils.checkpoint_steps(path)) - {step})
        remedy = f"give another one, {path}@{others[-1]}" if others else "there is no other one: put it back as it was"
        raise DataError(f"{path}/{step} is damaged ({damage}); {remedy}")
    if damage := checksums.find_damage(path / "base"):
        raise DataError(f"{path}/base is damaged ({damage}), and there is one of it alone: put it back as it was")


def _read(
    directory: pathlib.Path, place: Callable[[str], jax.sharding.Sharding], dtype: str, exact: set[str]
) -> dict[str, jax.Array]:
    """The arrays in `directory` by name, where `place` says; adapters and `exact` as saved, the rest as `dtype`."""
    # The handler itself: a Checkpointer warns of metadata that a part of a step does not have.
    with contextlib.closing(ocp.StandardCheckpointHandler()) as reader:
        like = {}
        for name, saved in reader.metadata(directory).tree.items():
            as_saved = name in exact or name.endswith((".lora_a", ".lora_b"))
            kind = saved.dtype if as_saved else jnp.dtype(dtype)
            like[name] = jax.ShapeDtypeStruct(saved.shape, kind, sharding=place(name))
        return reader.restore(directory, args=ocp.args.StandardRestore(like))


def weight_files(weights: str) -> list[pathlib.Path]:
    """The files that `load_policy` reads numbers from: a Hugging Face directory's, or a checkpoint's."""
    path = local_weights(weights)
    if files := sorted(path.glob("*.safetensors")):
        return files
    step = find_step(path, split_step(weights)[1]) if ocp.utils.checkpoint_steps(path) else 0
    parts = (path / "base", path / str(step) / "params")
    return sorted(file for part in parts for file in paths.files_below(part))


def weights_checksum(weights: str) -> str:
    """sha256 over names and contents of the weights' files: two runs with the same figure had the same weights."""
    digest = hashlib.sha256()
    for file in weight_files(weights):
        digest.update(f"{file.name} {paths.file_size(file)} ".encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()
