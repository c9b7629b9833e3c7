"""Checkpoints of a stage: Orbax, asynchronous. State and the batch source's position; and how to use them later.

A state with a number that is not finite is never saved. One whose files are not as they were written is not gone on
from: the one before it is, and it is put aside as <step>.damaged.

<workdir>/checkpoints/<stage>/policy/      config.json, tokenizer and image settings, copied from the weights
<workdir>/checkpoints/<stage>/base/        what the stage does not train (LoRA, frozen parts): arrays, written once
<workdir>/checkpoints/<stage>/<step>/      arrays of what it trains and of the optimiser; source.json; lora.json;
                                           metrics.json: the validation's score, by which the best is kept;
                                           checksums.json: of all of these, a part of the commit

So a stage's directory is a whole policy wherever the weights it started from have gone, and a step costs no more disk
than what is trained. Whoever loads the policy gets adapters merged.
"""

import contextlib
import functools
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

from rsagent_jax.config.import_path import first_line
from rsagent_jax.config.schema import LoraConfig
from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.models.qwen25_vl.load import copy_policy_files
from rsagent_jax.models.qwen25_vl.steps import MEASURE, SCORE, score_of
from rsagent_jax.runtime import checksums, processes
from rsagent_jax.runtime.paths import absolute, bucket_problem, is_remote, move_folder, storage_kind, storage_problem
from rsagent_jax.runtime.progress import PROGRESS
from rsagent_jax.train.state import EMPTY, TrainState
from rsagent_jax.types import DataError

NO_ADAPTERS = LoraConfig()
REMEDY = "use another --workdir, or the config it was made with"


class Checkpoints:
    """One stage's checkpoints; the newest are kept, and the best one of those that were saved with a score."""

    def __init__(
        self,
        directory: pathlib.Path,
        weights: pathlib.Path,
        adapters: LoraConfig = NO_ADAPTERS,
        measure: str | None = None,
        *,
        keep_last: int = 2,
        keep_every: int = 0,
        minutes: float = 0.0,
    ):
        """measure: what the scores are of. Those of another one, from an earlier start, count as not measured.

        keep_last: how many of the newest stay; keep_every: those of every so many updates stay as well, 0 = none;
        minutes: between two of them, for `due`. DataError where the directory cannot be written to.
        """
        self.directory, self.weights, self.measure = absolute(directory), weights, measure
        self.adapters = {"rank": adapters.rank, "alpha": adapters.alpha} if adapters.rank else None
        self.failed: BaseException | None = None  # what ended a save in the background
        self.has_base = False  # the one on disk is that of this run
        self.minutes, self.saved_at, self.saving = minutes, time.monotonic(), -1
        self._copy_policy()
        kept = ocp.checkpoint_managers
        score = functools.partial(score_of, measure=measure)
        policies = [kept.LatestN(n=keep_last), kept.BestN(get_metric_fn=score, n=1)]
        policies += [kept.EveryNSteps(keep_every)] if keep_every else []
        # best_fn, beside the policy, lets the scores be written and be read again by the next start.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=kept.AnyPreservationPolicy(policies),
            best_fn=score,
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(
                post_finalization_callback=self._write_checksums, barrier_sync_fn=self._meet_others
            ),
            # Of a save that a kill or a full disk has cut short. In a bucket what has no mark counts as one, `policy`
            # too; there Orbax reads nothing without a mark, and writes over it.
            cleanup_tmp_directories=not is_remote(self.directory),
        )
        self._put_unopenable_aside()
        with self._storing("", "opened"):
            self.manager = ocp.CheckpointManager(self.directory, options=options)

    def _meet_others(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's barrier for its threads. One whose own part of a save has failed would wait there for the others, and
        they for it, for twenty minutes: it ends with its error instead, and `check` ends the run. (Preempted, in whose
        handling a state is saved, is no Exception.)"""
        if jax.process_count() > 1 and isinstance(error := sys.exception(), Exception):
            self.failed = error
            raise error
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def due(self) -> bool:
        """Whether `minutes` have passed since the last save; the lead's clock decides, which all call together."""
        own = bool(self.minutes) and time.monotonic() - self.saved_at >= 60 * self.minutes
        return processes.exchange(own)[0] if self.minutes else False

    def save(
        self, state: TrainState, source: dict[str, Any], base: nnx.State = EMPTY, score: float | None = None
    ) -> None:
        """Starts writing in the background. The stage's first save writes the base as well, and waits for that.

        score: the larger the better; None for one that was not measured. DataError where parameters are not finite, and
        where this one, or the one before it, cannot be written.
        """
        step = int(state.step)
        self.check_there()
        if broken := not_finite(state.params):
            raise DataError(
                f"{self.directory.name}: after update {step} {broken}; nothing was saved, and the last checkpoint is as"
                " it was. Lower the learning rate, and see l2_grads and l2_updates in metrics.jsonl"
            )
        PROGRESS.enter_part("writing of an earlier one", slow=True)
        self.finish()
        PROGRESS.enter_part("")
        with self._storing(step):
            if not self._is_there("policy"):
                self._copy_policy()
            if jax.tree.leaves(base) and not (self.has_base and self._is_there("base")):
                with ocp.StandardCheckpointer() as writer:  # over one that no finished step belongs to
                    writer.save(self.directory / "base", convert.flat_state(base), force=True)
                if processes.is_lead():
                    checksums.write_checksums(self.directory / "base")
                self.has_base = True
            args = {name: ocp.args.StandardSave(tree) for name, tree in _trees(state).items()}
            if self.adapters:
                args["lora"] = ocp.args.JsonSave(self.adapters)
            args = ocp.args.Composite(source=ocp.args.JsonSave(source), **args)
            self.saving = step
            self.manager.save(step, args=args, metrics={SCORE: score, MEASURE: self.measure})
        self.saved_at = time.monotonic()

    def check_there(self) -> None:
        """DataError where the directory is no more: Orbax would make another, without what a start needs."""
        if not self.directory.exists():
            raise DataError(
                f"{self.directory} has been removed under the run, and all that was saved with it: nothing can be gone"
                " on from. Put the work directory back, or begin anew in another --workdir"
            )

    def _copy_policy(self) -> None:
        processes.on_lead(self._storing("policy")(lambda: copy_policy_files(self.weights, self.directory / "policy")))

    def _is_there(self, name: str) -> bool:
        """As the lead sees it, which all call together. A step is of no use without it, and somebody may remove it."""
        return processes.exchange((self.directory / name).exists())[0]

    def _write_checksums(self) -> None:
        """Of the step that is being finished, before Orbax gives it its name; on the lead alone."""
        unnamed = sorted(self.directory.glob(f"{self.saving}.orbax-checkpoint-tmp*"))  # a bucket has none
        checksums.write_checksums(unnamed[-1] if unnamed else self.directory / str(self.saving))

    @property
    def newest(self) -> int | None:
        """Step of the latest save, of this start or an earlier one; None where there is none."""
        return self.manager.latest_step()

    def finish(self) -> None:
        """Waits for what is being written. DataError where that fails."""
        with self._storing(self.saving):
            self.manager.wait_until_finished()

    def check(self) -> None:
        """DataError once a save in the background has failed."""
        if self.failed or not self.manager.is_saving_in_progress():
            self.finish()  # for nothing: it raises what ended the save

    @contextlib.contextmanager
    def _storing(self, step: int | str, done: str = "written") -> Iterator[None]:
        """Whatever Orbax raises within is a DataError: its threads do nothing but write."""
        try:
            yield
        except DataError:
            raise
        except Exception as error:
            whole = sorted(ocp.utils.checkpoint_steps(self.directory)) if self.directory.exists() else []
            last = f"the last whole one is {whole[-1]}, and" if whole else "there is none before it;"
            why = bucket_problem(error) or storage_problem(error)
            raise storage_kind(error)(
                f"{self.directory / str(step)} cannot be {done} ({why}); {last}"
                " nothing else was touched. Make room, or give the right to write there, and run the same command again"
            ) from error

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest whole state with the shapes and shardings of `like`, and the source's position; None without one.

        Damaged ones after it are named on the terminal and put aside. DataError where all there are are damaged, or
        where one does not fit `like`.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self.manager.all_steps(), reverse=True):
            if why := checksums.find_damage(self.directory / str(step)):
                damaged[step] = why
                continue
            restored = self._read(step, like)
            if damaged:
                self._put_aside(damaged)
                self.manager.reload()
            return restored
        if damaged:
            raise self._none_left(damaged)
        return None

    def _none_left(self, damaged: dict[int, str]) -> DataError:
        return DataError(
            f"{self.directory}: none of its checkpoints can be used: {_each(damaged)}. Put one back as it was, or"
            f" remove {self.directory} to begin the stage anew"
        )

    def _put_unopenable_aside(self) -> None:
        """Orbax reads the scores of all steps when it opens a directory, and opens none where one cannot be read."""
        steps = sorted(ocp.utils.checkpoint_steps(self.directory))
        found = {step: checksums.find_damage(self.directory / str(step), "metrics/") for step in steps}
        damaged = {step: why for step, why in found.items() if why}
        if damaged and len(damaged) == len(steps):
            raise self._none_left(damaged)
        if damaged:
            self._put_aside(damaged)

    def _put_aside(self, damaged: dict[int, str]) -> None:
        """So that the steps can be saved again; nothing of them is removed."""
        if processes.is_lead():
            print(
                f"warning: {self.directory}: goes on without what is damaged: {_each(damaged)}. It is kept as"
                " STEP.damaged, which nothing reads; remove it to free its room"
            )
            for step in damaged:
                aside = self.directory / f"{step}.damaged"
                with self._storing(aside.name):
                    move_folder(self.directory / str(step), aside)
        processes.exchange("")  # before anybody looks again

    def _read(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state and the source's position. DataError where it is of another model."""
        trees, saved = jax.tree.map(ocp.utils.to_shape_dtype_struct, _trees(like)), self.directory / str(step)
        args = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
        if self.adapters:
            args["lora"] = ocp.args.JsonRestore()
        try:
            restored = self.manager.restore(step, args=ocp.args.Composite(source=ocp.args.JsonRestore(), **args))
            number, *leaves = (restored["optimizer"][name] for name in trees["optimizer"])
        except Exception as error:
            if bucket_problem(error):
                raise
            raise DataError(
                f"{saved} does not fit the model and optimiser of this config ({first_line(error)}); {REMEDY}"
            ) from error
        if self.adapters and restored["lora"] != self.adapters:
            raise DataError(f"{saved} has adapters with {restored['lora']}, this config has {self.adapters}; {REMEDY}")
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
        if damage := "it is gone" * (not self._is_there("base")) or checksums.find_damage(self.directory / "base"):
            raise DataError(
                f"{self.directory}/base is damaged ({damage}), and there is one of it alone: put it back as it was, or"
                " begin the stage anew in another --workdir"
            )
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

    def close(self) -> None:
        """Waits for what is being written. DataError where that fails."""
        with self._storing(self.saving):
            self.manager.close()


def not_finite(params: nnx.State) -> str:
    """Which parameters hold a number that is none, in words; "" where all are finite."""
    finite = jax.device_get(_all_finite(convert.flat_state(params)))
    names = [name for name, all_finite in finite.items() if not all_finite]
    return f"{len(names)} of {len(finite)} parameters are not finite, such as {names[0]}" if names else ""


@jax.jit
def _all_finite(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(value).all() for name, value in params.items()}


def _each(damaged: dict[int, str]) -> str:
    return "; ".join(f"{step} ({why})" for step, why in damaged.items())


def _trees(state: TrainState) -> dict[str, dict[str, jax.Array]]:
    """The state as plain dicts, so that files do not depend on the version of flax or optax."""
    rest = [state.step, *jax.tree.leaves(state.opt_state)]
    return {
        "params": convert.flat_state(state.params),
        "optimizer": {f"leaf_{i:05d}": leaf for i, leaf in enumerate(rest)},
    }
