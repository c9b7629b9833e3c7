"""Checkpoints of a stage: Orbax, asynchronous. State and the batch source's position; and how to use them later.

<workdir>/checkpoints/<stage>/policy/      config.json, tokenizer and image settings, copied from the weights
<workdir>/checkpoints/<stage>/base/        what the stage does not train (LoRA, frozen parts): arrays, written once
<workdir>/checkpoints/<stage>/<step>/      arrays of what it trains and of the optimiser; source.json; lora.json;
                                           metrics.json: the validation's score, by which the best is kept

So a stage's directory is a whole policy wherever the weights it started from have gone, and a step costs no more disk
than what is trained. Whoever loads the policy gets adapters merged.
"""

import functools
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from rsagent_jax.config.import_path import first_line
from rsagent_jax.config.schema import LoraConfig
from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.models.qwen25_vl.load import copy_policy_files
from rsagent_jax.models.qwen25_vl.steps import MEASURE, SCORE, score_of
from rsagent_jax.runtime import processes
from rsagent_jax.runtime.paths import absolute, bucket_problem
from rsagent_jax.train.state import EMPTY, TrainState
from rsagent_jax.types import DataError

NO_ADAPTERS = LoraConfig()
REMEDY = "use another --workdir, or the config it was made with"


class Checkpoints:
    """One stage's checkpoints; the newest two are kept, and the best one of those that were saved with a score."""

    def __init__(
        self,
        directory: pathlib.Path,
        weights: pathlib.Path,
        adapters: LoraConfig = NO_ADAPTERS,
        measure: str | None = None,
    ):
        """measure: what the scores are of. Those of another one, from an earlier start, count as not measured."""
        self.directory, self.measure = absolute(directory), measure
        self.adapters = {"rank": adapters.rank, "alpha": adapters.alpha} if adapters.rank else None
        self.has_base = False  # the one on disk is that of this run
        if processes.is_lead():
            copy_policy_files(weights, self.directory / "policy")
        kept = ocp.checkpoint_managers
        score = functools.partial(score_of, measure=measure)
        policy = kept.AnyPreservationPolicy([kept.LatestN(n=2), kept.BestN(get_metric_fn=score, n=1)])
        # best_fn, beside the policy, lets the scores be written and be read again by the next start.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy, best_fn=score, enable_async_checkpointing=True
        )
        self.manager = ocp.CheckpointManager(self.directory, options=options)

    def save(
        self, state: TrainState, source: dict[str, Any], base: nnx.State = EMPTY, score: float | None = None
    ) -> None:
        """Starts writing in the background. The stage's first save writes the base as well, and waits for that.

        score: the larger the better; None for one that was not measured.
        """
        if jax.tree.leaves(base) and not self.has_base:
            with ocp.StandardCheckpointer() as writer:  # over one that no finished step belongs to
                writer.save(self.directory / "base", convert.flat_state(base), force=True)
            self.has_base = True
        args = {name: ocp.args.StandardSave(tree) for name, tree in _trees(state).items()}
        if self.adapters:
            args["lora"] = ocp.args.JsonSave(self.adapters)
        args = ocp.args.Composite(source=ocp.args.JsonSave(source), **args)
        self.manager.save(int(state.step), args=args, metrics={SCORE: score, MEASURE: self.measure})

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest state with the shapes and shardings of `like`, and the source's position; None without one."""
        step = self.manager.latest_step()
        if step is None:
            return None
        trees, saved = jax.tree.map(ocp.utils.to_shape_dtype_struct, _trees(like)), self.directory / str(step)
        args = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
        if self.adapters:
            args["lora"] = ocp.args.JsonRestore()
        try:
            restored = self.manager.restore(step, args=ocp.args.Composite(source=ocp.args.JsonRestore(), **args))
        except (ValueError, KeyError, TypeError) as error:
            if bucket_problem(error):
                raise
            raise DataError(
                f"{saved} does not fit the model and optimiser of this config ({first_line(error)}); {REMEDY}"
            ) from error
        if self.adapters and restored["lora"] != self.adapters:
            raise DataError(f"{saved} has adapters with {restored['lora']}, this config has {self.adapters}; {REMEDY}")
        number, *leaves = (restored["optimizer"][name] for name in trees["optimizer"])
        state = TrainState(
            step=number,
            params=convert.with_values(like.params, restored["params"]),
            opt_state=jax.tree.unflatten(jax.tree.structure(like.opt_state), leaves),
        )
        return state, restored["source"]

    def restore_base(self, like: nnx.State) -> nnx.State:
        """The base that the stage started with, where that of `like` is: the weights may not be the same any more."""
        if not jax.tree.leaves(like):
            return like
        tree = convert.flat_state(like)
        try:
            with ocp.StandardCheckpointer() as reader:
                values = reader.restore(self.directory / "base", jax.tree.map(ocp.utils.to_shape_dtype_struct, tree))
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            if bucket_problem(error) and not isinstance(error, FileNotFoundError):
                raise
            raise DataError(
                f"{self.directory}/base does not fit the parameters that this config leaves untrained"
                f" ({first_line(error)}); {REMEDY}"
            ) from error
        self.has_base = True
        return convert.with_values(like, values)

    @property
    def saved(self) -> int | None:
        """The step of the newest one, asked for or finished."""
        return self.manager.latest_step()

    def close(self) -> None:
        self.manager.wait_until_finished()
        self.manager.close()


def _trees(state: TrainState) -> dict[str, dict[str, jax.Array]]:
    """The state as plain dicts, so that files do not depend on the version of flax or optax."""
    rest = [state.step, *jax.tree.leaves(state.opt_state)]
    return {
        "params": convert.flat_state(state.params),
        "optimizer": {f"leaf_{i:05d}": leaf for i, leaf in enumerate(rest)},
    }
