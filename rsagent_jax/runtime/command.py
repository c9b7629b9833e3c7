"""What every command shares: a command is a function `main`, and its parameters are the command line.

  def main(
      config: CollectConfig,
      *,
      workdir: str = "",  # directory for everything this command leaves behind
      shard: str = "0/1",  # i/n: every n-th trajectory from the i-th on, counted from 0
  ) -> int | None:

`config` is read from --config=FILE (or from the file that is its default) and --config.a.b=value. Parameters before `/`
and `*rest` are given by position, all others as --name=value, switches as --name and --noname. The comment beside a
parameter is its line of --help (runtime/help.py). What `main` returns is the exit status, None being 0.
"""

import ast
import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import pathlib
import select
import signal
import sys
import threading
import time
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from absl import logging
from ml_collections import ConfigDict

from rsagent_jax.config import schema
from rsagent_jax.config.ablation import AblationConfig
from rsagent_jax.config.build import build_config, build_fields, load_config_file, refuse_config
from rsagent_jax.config.import_path import load_file, shipped
from rsagent_jax.config.overrides import put_overrides, read_text, split_arguments
from rsagent_jax.config.pretrain import PretrainConfig
from rsagent_jax.config.ranges import field_type
from rsagent_jax.config.recipe import RecipeConfig
from rsagent_jax.runtime import preemption
from rsagent_jax.runtime.help import help_page
from rsagent_jax.runtime.paths import bucket_problem, bucket_used, check_writable, open_path, storage_kind
from rsagent_jax.runtime.preemption import PREEMPTED
from rsagent_jax.runtime.watchdog import WATCHDOG
from rsagent_jax.types import DataError
from sam_bridge.types import SegmenterError

NO_READER = 128 + signal.SIGPIPE  # as of a program that the signal ends
OWNERS = {  # whose config files a class describes
    schema.TrainConfig: "train.py",
    schema.EvalConfig: "evaluate.py",
    schema.CollectConfig: "rsagent_jax.collect",
    schema.ProblemsConfig: "rsagent_jax.problems",
    schema.SegmentConfig: "rsagent_jax.segment",
    PretrainConfig: "rsagent_jax.tiny.pretrain",
    RecipeConfig: "rsagent_jax.reproduce",
    AblationConfig: "rsagent_jax.ablate",
}


def start_command() -> None:
    """Of a file's `if __name__ == "__main__"`. It stands above what the file imports, which --help does without."""
    main = sys.modules["__main__"]
    _exit(run_command(main.__spec__.name if main.__spec__ else main.__file__, sys.argv[1:]))


def console_script() -> None:
    """`rsagent-NAME` of an installed package: train, evaluate, or a module of rsagent_jax."""
    name = pathlib.Path(sys.argv[0]).stem.removeprefix("rsagent-").replace("-", "_")
    module = f"rsagent_jax.tiny.{name}" if name == "synthetic" else f"rsagent_jax.{name}"
    _exit(run_command(shipped(f"{name}.py") if name in ("train", "evaluate") else module, sys.argv[1:]))


def _exit(status: int) -> NoReturn:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        status = status or NO_READER
    if status == NO_READER:  # or Python would complain at its end of what it cannot write
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    WATCHDOG.end(status)
    if status == PREEMPTED:  # all is kept, and Python's own end takes seconds of a notice that may be over
        leave_together(status)
    # Threads of Orbax's would wait for a bucket that is gone, a quarter of an hour. A command without them may hold
    # jax's service for other hosts (rsagent_jax.reproduce), which would be ended by its absence.
    if status and bucket_used() and "orbax.checkpoint" in sys.modules:
        preemption.leave(status)
    sys.exit(status)


def leave_together(status: int) -> NoReturn:
    """The end of the process without Python's own, which waits for threads, and without harm to other hosts."""
    WATCHDOG.end(status)
    with contextlib.suppress(Exception):  # another may have ended already
        if jax := sys.modules.get("jax"):
            jax.distributed.shutdown()  # waits for the others, whom the first one's end would end as well
    preemption.leave(status)


def _reader_is_gone() -> bool:
    """Whether stdout is a pipe that nobody reads any more, as of `| head`."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)  # only what is always told: an error, an end
        return bool(poll.poll(0))
    except (OSError, ValueError):  # no file: of a test, or closed
        return False


def _not_lost(unraisable: "sys.UnraisableHookArgs") -> None:
    """Ctrl-C in the middle of a destructor or of a callback, where Python drops it, comes once more. Nothing
    is said of Orbax's coroutines, nor of what tensorstore tells their loop, that an error has cut off: it is raised."""
    coroutine = inspect.iscoroutine(unraisable.object) and "orbax" in unraisable.object.cr_code.co_filename
    if coroutine or str(unraisable.exc_value) == "Event loop is closed":
        return
    if unraisable.exc_type is KeyboardInterrupt:
        threading.Thread(target=_interrupt_again, daemon=True).start()
    else:
        sys.__unraisablehook__(unraisable)


def _interrupt_again() -> None:
    """Once the main thread has left the hook, in which Python would drop it as well."""
    main = threading.main_thread().ident
    while any(frame.f_code is _not_lost.__code__ for frame, _ in traceback.walk_stack(sys._current_frames()[main])):
        time.sleep(0.01)
    signal.pthread_kill(main, signal.SIGINT)


def run_command(name: str, argv: Sequence[str]) -> int:
    """The exit status of the command in a module, or in a file. Bad input: one message on stderr and the error's
    `status`, 2, or 74 where storage fails; Ctrl-C: 130; SIGTERM where the command can be gone on with: PREEMPTED;
    nobody reads its output any more: NO_READER."""
    resumes = False
    sys.unraisablehook = _not_lost
    try:
        if {"--help", "-h", "-help", "--helpfull", "--helpshort"} & set(argv):
            with contextlib.suppress(BrokenPipeError):  # of `| head`
                file = name if name.endswith(".py") else importlib.util.find_spec(name).origin  # not imported
                print(help_page(pathlib.Path(file).read_text(encoding="utf-8"), known_configs()), flush=True)
            return 0
        main = (load_file(pathlib.Path(name).resolve()) if name.endswith(".py") else importlib.import_module(name)).main
        quieten()
        arguments, flags = parse_arguments(main, argv)
        config = flags.get("config")
        file = pathlib.Path(name).name if name.endswith(".py") else name
        owned = config if OWNERS.get(type(config)) == file else None  # doctor and data_check look at others' configs
        is_training = isinstance(owned, schema.TrainConfig)
        resumes = is_training or isinstance(owned, RecipeConfig | AblationConfig)
        keeps = is_training or isinstance(owned, schema.EvalConfig | schema.CollectConfig)
        first_s, answer_s = (60 * config.hang_minutes, config.slowest_answer_s) if keeps else (0.0, 0.0)
        with (
            preemption.listening() if keeps else contextlib.nullcontext(),
            WATCHDOG.limited(first_s, answer_s),
        ):
            return main(*arguments, **flags) or 0
    except (DataError, SegmenterError) as error:
        WATCHDOG.explain(error)
        kind = "segmenter: " if isinstance(error, SegmenterError) else ""
        print(f"error: {kind}{error}", file=sys.stderr)
        return getattr(error, "status", 2)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return NO_READER
        WATCHDOG.explain(error)
        if not (said := bucket_problem(error)):
            raise
        print(f"error: {said}", file=sys.stderr)
        return storage_kind(error).status
    except preemption.Preempted as stop:
        print(f"stopped by {stop.signal_name}{stop.kept}; the same command goes on", file=sys.stderr)
        return preemption.status_of(stop.signal_name)
    except SystemExit as error:  # of a user's function: no command ends so, and a status of 0 would look like one done
        WATCHDOG.explain(error)
        at = traceback.extract_tb(error.__traceback__)[-1]
        print(f"error: {at.filename}, line {at.lineno} ended Python with status {error.code}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        WATCHDOG.explain(error)
        hint = "; run the same command again to go on from the last checkpoint" if resumes else ""
        print(f"stopped{hint}", file=sys.stderr)
        return preemption.INTERRUPTED


def parse_arguments(main: Callable[..., Any], argv: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """What `main` is to be called with. One DataError lists everything that is wrong with a config, or with flags."""
    hints = {name: _without_none(hint) for name, hint in typing.get_type_hints(main, include_extras=True).items()}
    parameters = inspect.signature(main).parameters
    named = [p for p in parameters.values() if p.kind not in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL)]
    own = [(p.name, hints[p.name], *[p.default] * (p.default is not p.empty)) for p in named if p.name != "config"]
    flags, values, config = dataclasses.make_dataclass("Flags", own, kw_only=True), {}, {}
    classes = typing.get_args(hints.get("config")) or (hints.get("config"),)

    def is_switch(name: str) -> bool:
        group, _, field = name.partition(".")
        return bool in ([field_type(cls, field) for cls in classes] if group == "config" else [hints.get(name)])

    pairs, given = split_arguments(argv, is_switch)
    # As of a variable that the shell does not know: the default would be taken for the one that is meant.
    if blank := [name for name, text in pairs if not text and "." not in name]:
        raise DataError(f"--{blank[0]}= is empty: give a value, or leave it out")
    if "config" in parameters:
        file = [parameters["config"].default, *(text for name, text in pairs if name == "config")][-1]
        cls, values["config"] = _config_file(file, classes)
    problems, wrong = put_overrides([pair for pair in pairs if pair[0] != "config"], values), []
    if "config" in parameters:
        config = {"config": build_config(cls, values.pop("config"), problems)}
    chosen = build_fields(flags, values, "--", wrong)
    refuse_config("command line", wrong)
    return _positional(parameters, hints, given), config | vars(chosen)


def _without_none(hint: Any) -> Any:
    """`int` of `int | None`; any other type as it is."""
    options = typing.get_args(hint)
    return options[0] if len(options) == 2 and options[1] is type(None) else hint


def _positional(parameters: Mapping[str, inspect.Parameter], hints: dict[str, Any], given: list[str]) -> list[Any]:
    names = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_ONLY]
    rest = [p.name for p in parameters.values() if p.kind is p.VAR_POSITIONAL]
    if len(given) < len(names):
        wanted = " ".join(names).upper()
        raise DataError(f"{names[len(given)].upper()} is missing; the arguments are: {wanted}")
    if len(given) > len(names) and not rest:
        hint = "; an override starts with --config." if "=" in given[-1] else ""
        raise DataError(f"unexpected argument {given[len(names)]!r}{hint}")
    names += rest * (len(given) - len(names))
    return [read_text(hints[name], text) for name, text in zip(names, given, strict=True)]


def quieten() -> None:
    """Nothing on the terminal that a user can do nothing about; before the first use of a device."""
    logging.set_verbosity(logging.FATAL)  # Orbax reports every file it touches, and prints what it raises as well
    # Importing JAX names the platforms on a TPU VM. Elsewhere it would try libtpu, which is there for its compiler, and
    # that complains about a TPU that it cannot find. A plugin of another accelerator is left to JAX.
    jax = sys.modules.get("jax")  # commands that need no device start without it
    plugins = importlib.util.find_spec("jax_plugins") or importlib.metadata.entry_points(group="jax_plugins")
    if jax and jax.config.jax_platforms is None and not plugins:
        jax.config.update("jax_platforms", "cpu")


# Who leaves what in a work directory, beside files that have the same names with all of them.
LEFT = {"checkpoints": "train.py", "shards": "evaluate.py", "attempts": "rsagent_jax.collect"}


def make_workdir(directory: str, flag: str = "workdir", own: str = "") -> pathlib.Path:
    """The directory that --workdir (or another flag) names, made if need be and known to be writable. DataError where
    it has a folder of LEFT, if it is not `own`, the command's."""
    if not directory:
        raise DataError(f"--{flag}=DIR is required")
    path = open_path(directory)
    try:
        check_writable(path)
    except OSError as error:
        raise storage_kind(error)(f"--{flag}={path} cannot be written to: {error.strerror or error}") from error
    for name, command in LEFT.items() if own else ():
        if name != own and (path / name).exists():
            raise DataError(f"--{flag}={path} holds what {command} left there ({name}/); give a directory of its own")
    return path


def check_out_file(path: pathlib.Path | None, flag: str) -> None:
    """DataError where a flag names a folder in place of the file that it wants, before the work that is to go there."""
    if path is not None and path.is_dir():
        raise DataError(f"--{flag}={path} is a folder; give a file")


def use_compilation_cache(directory: str, fallback: pathlib.Path) -> None:
    """Compiled programs are kept and found again by the next run."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(open_path(directory) if directory else fallback))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# ---------------------------------------------------------------------------------------------- the config file


def _config_file(path: Any, classes: Sequence[type]) -> tuple[type, dict[str, Any]]:
    """The class of a config file, one of `classes`, and what the file says."""
    if path in ("", inspect.Parameter.empty):
        raise DataError("--config=configs/X.py is required")
    config = load_config_file(path)
    owner = config_owner(config)
    if owner is not None and owner not in classes:
        wanted = " or ".join(OWNERS[cls] for cls in classes)
        raise DataError(f"{path} is a config of {OWNERS[owner]}; here one of {wanted} is needed")
    return owner or classes[0], config.to_dict()


def config_owner(config: ConfigDict) -> type | None:
    """The class of OWNERS whose fields the config has, all of them; the largest. None for a config of a few fields."""
    fields = {cls: {field.name for field in dataclasses.fields(cls)} for cls in OWNERS}
    return max((cls for cls in OWNERS if fields[cls] <= {*config}), key=lambda c: len(fields[c]), default=None)


def known_configs() -> Iterator[tuple[str, type | None, str]]:
    """(path, class, first sentence of its docstring) of every file of configs/."""
    for file in sorted(pathlib.Path(shipped("configs")).rglob("[a-z]*.py")):
        with contextlib.suppress(DataError):
            doc = " ".join((ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split())
            yield str(file), config_owner(load_config_file(str(file))), doc.partition(". ")[0]
