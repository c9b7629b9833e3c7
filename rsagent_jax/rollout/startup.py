"""What each command needs, looked at before weights are loaded and programs compiled; the cheapest first.

Values of the config are right when this starts (config/build.py). A mistake is one DataError within seconds, not a
traceback after the first stage. Nothing here imports torch: a back end of our own is looked for, not loaded.
"""

import dataclasses
import importlib.util
import pathlib
import shutil

from rsagent_jax.agent.budget import Texts, image_sizes, trajectory_budget, typical_size
from rsagent_jax.agent.segmenter import open_segmenter
from rsagent_jax.agent.views import fixed_size
from rsagent_jax.config.import_path import import_path
from rsagent_jax.config.schema import AgentConfig, BatchConfig, PolicyConfig, SamplingConfig, SegmenterConfig
from rsagent_jax.data.processor import Processor
from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig, load_config
from rsagent_jax.models.qwen25_vl.load import local_weights, policy_directory, processor_directory
from rsagent_jax.models.qwen25_vl.positions import padded_patches
from rsagent_jax.models.qwen25_vl.steps import find_step, split_step
from rsagent_jax.rollout.driver import pixel_limits
from rsagent_jax.rollout.engine import fill_sampling_defaults
from rsagent_jax.rollout.open import engine_layout
from rsagent_jax.runtime.paths import is_remote
from rsagent_jax.types import DataError, StorageError
from sam_bridge.backends import NAMES, BackendError, local_checkpoint

SPACE = 64 << 20  # bytes for logs, reports and compiled programs
GIB = 1 << 30


def check_disk(directory: pathlib.Path, more: int = 0) -> None:
    """StorageError unless `more` bytes and a little have room where `directory` is. A bucket has room for anything."""
    if is_remote(directory):
        return
    free = shutil.disk_usage(directory).free
    if free < more + SPACE:
        raise StorageError(
            f"{directory} has {free / GIB:.2f} GiB of free space, and {(more + SPACE) / GIB:.2f} are needed for what is"
            " written there; make room, or choose another directory"
        )


def policy_shape(weights: str) -> tuple[Qwen25VLConfig, Processor]:
    """What is known of the policy before its weights are downloaded."""
    directory = processor_directory(weights)
    return load_config(directory), Processor.load(directory)


def check_weights(weights: str) -> None:
    """Downloads those of a hub or a bucket, so it comes last. DataError for a directory without weights, or with those
    of another model."""
    directory, path = policy_directory(weights), local_weights(weights)
    if directory == path:
        convert.check_files(directory, load_config(directory))
    else:
        find_step(path, split_step(weights)[1])


def check_segmenter(config: SegmenterConfig) -> None:
    """A side-car that runs is asked who it is; of one of our own the files are looked for."""
    if config.mode == "connect":
        with open_segmenter(config):
            return
    if config.addresses:  # of a config for connect that the command line has turned, or given by mistake
        print(f"segmenter.mode is {config.mode}: {', '.join(config.addresses)} of segmenter.addresses is not asked")
    if config.backend == "sam2":
        try:  # downloaded now, not while a side-car is waited for
            local_checkpoint(config.checkpoint)
        except BackendError as error:
            raise DataError(f"segmenter.checkpoint: {error}") from error
        if missing := [name for name in ("torch", "sam2") if importlib.util.find_spec(name) is None]:
            raise DataError(f"segmenter.backend sam2 needs {' and '.join(missing)}: see docs/sidecar.md")
    elif config.backend not in NAMES:
        module, _, name = config.backend.rpartition(":")
        if config.mode == "inprocess":
            import_path(config.backend, ())
        elif not (pathlib.Path(module).is_file() if module.endswith(".py") else _is_module(module)):
            raise DataError(f"segmenter.backend {config.backend!r}: there is no {module}, whose {name} is to be called")


def check_policy(policy: PolicyConfig, agent: AgentConfig, sampling: SamplingConfig) -> str:
    """The budget of a trajectory as a line for people. DataError where the policy cannot play so. Its weights are left
    to check_weights."""
    if policy.backend == "openai":
        from rsagent_jax.rollout.served import check_served

        processor = Processor.load(processor_directory(policy.weights))
        budget = check_budget(agent, processor, sampling)
        check_served(policy.remote, processor)
        return budget
    return check_rollout(agent, sampling, *policy_shape(policy.weights), "")


def check_rollout(
    agent: AgentConfig,
    sampling: SamplingConfig,
    shape: Qwen25VLConfig,
    processor: Processor,
    group: str,
    batch: BatchConfig | None = None,
) -> str:
    """The budget of a trajectory as a line for people, where this process's devices can play such ones.

    group: of the config that holds `sampling`, and `batch` where they are trained on; "" where they stand at its root.
    """
    budget = check_budget(agent, processor, sampling, batch, group)
    name = f"{group}.sampling".lstrip(".")
    sampling, mesh = engine_layout(sampling, shape)
    fill_sampling_defaults(sampling, shape, mesh, name)
    return budget


def check_budget(
    agent: AgentConfig,
    processor: Processor,
    sampling: SamplingConfig | None = None,
    batch: BatchConfig | None = None,
    name: str = "",
) -> str:
    """The budget of a trajectory as a line for people. DataError when a typical one cannot reach agent.max_turns.

    sampling: of whoever plays; None in SFT, which reads trajectories and bounds them by a row of `batch`. name: of the
    stage in the config, "" where the groups stand at its root.
    """
    views, prefix = pixel_limits(agent, processor), name and f"{name}."
    size, images = typical_size(views), processor.images.limits
    texts = Texts.of(agent, processor.encode, fixed_size(*size, views)[::-1])
    room = sampling or dataclasses.replace(SamplingConfig(), context=batch.tokens)
    budget = trajectory_budget(agent, room, texts, size, views, images)
    turn, turns = budget.typical_turn, budget.max_turns
    needed = budget.needs(turn)
    image = f"{size[1]}x{size[0]} picture"
    typical = f"a typical trajectory ({image}, {turns} turns of {turn} tokens, the last one finish)"
    takes = (
        f"the opening takes {budget.opening} tokens, a mask's overlay {budget.mask}, a view at most {budget.view},"
        f" finish {budget.finish}"
    )
    if budget.max_new_tokens < budget.finish:
        raise DataError(f"{prefix}sampling.max_new_tokens = {budget.max_new_tokens}, but {takes}")
    if budget.longest_turn < turn:
        field, drawn = "sampling.context" if sampling else "batch.tokens", turns * turn
        advice = f"it to {needed} or more, or lower agent.max_turns, agent.max_pixels or agent.typical_turn"
        if budget.max_tokens and budget.max_tokens < drawn:
            advice = f"agent.max_tokens to {drawn} or more, or lower agent.max_turns or agent.typical_turn"
        raise DataError(
            f"{prefix}{field} = {room.context}: {typical} would end in turn {budget.turns_that_fit(turn) + 1};"
            f" {takes}. Raise {advice}"
        )
    patch = processor.images.patch_size
    shown = [(1, h // patch, w // patch) for h, w in image_sizes(agent, size, views, images)]
    view, overlay = (padded_patches((grid,), processor.config.vision) for grid in shown)
    for field, have, need in (
        ("sampling.patches", sampling and sampling.patches, max(view, overlay)),
        ("batch.patches", batch and batch.patches, view + (turns - 1) * overlay),
        ("batch.tokens", batch and batch.tokens, needed),
    ):
        if have is not None and have < need:
            raise DataError(f"{prefix}{field} = {have}, but {typical} takes {need}")
    worst = "fits" if budget.worst <= budget.context else "does not, so it is told its last turn"
    return (
        f"{prefix}budget of {room.context} tokens: {takes}. {turns} turns of up to {budget.longest_turn} tokens fit;"
        f" {typical} takes {needed}, with room for {budget.views_that_fit} views in place of masks; the worst case,"
        f" {budget.worst}, {worst}"
    )


def _is_module(name: str) -> bool:
    """Whether the side-car will find it; its package is imported for that, the module itself is not."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
