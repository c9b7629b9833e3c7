"""What every command shares: flags, one clear error for bad input, and the compilation cache."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.metadata
import importlib.util
import itertools
import operator
import pathlib
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from rsagent_jax import config as config_lib
from rsagent_jax.types import DataError
from sam_bridge.types import SegmenterError

CONFIG = "config"


def define_flags(directory: str = "workdir") -> None:
    """--config and the directory that the command writes to."""
    config_flags.DEFINE_config_file(CONFIG, None)
    flags.DEFINE_string(directory, None, "Directory for everything this command leaves behind.")


def run(
    main: Callable[..., Any], config_class: type, arguments: tuple[str, ...] = (), default_config: str | None = None
) -> None:
    """Parses the flags, builds the config, calls `main(config, *arguments)`.

    Bad input is one message on stderr and exit status 2; Ctrl-C is 130; else what `main` returns, None being 0.
    `arguments` names what the command takes besides flags.
    """

    def start(argv: list[str]) -> None:
        quieten()
        given = argv[1:]
        if len(given) > len(arguments):
            hint = "; an override starts with --config." if "=" in given[-1] else ""
            raise DataError(f"unexpected argument {given[len(arguments)]!r}{hint}")
        if len(given) < len(arguments):
            raise DataError(f"{arguments[len(given)]} is missing; the arguments are: {' '.join(arguments)}")
        if status := main(config_lib.build(config_class, flags.FLAGS[CONFIG].value), *given):
            sys.exit(status)

    try:
        app.run(start, flags_parser=functools.partial(_parse, config_class=config_class, default_config=default_config))
    except (DataError, SegmenterError) as error:
        kind = "segmenter: " if isinstance(error, SegmenterError) else ""
        print(f"error: {kind}{error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        resumes = config_class is config_lib.TrainConfig
        hint = "; run the same command again to go on from the last checkpoint" if resumes else ""
        print(f"stopped{hint}", file=sys.stderr)
        sys.exit(130)


def quieten() -> None:
    """Nothing on the terminal that a user can do nothing about; before the first use of a device."""
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file it touches
    # Importing JAX names the platforms on a TPU VM. Elsewhere it would try libtpu, which is there for its compiler, and
    # that complains about a TPU that it cannot find. A plugin of another accelerator is left to JAX.
    plugins = importlib.util.find_spec("jax_plugins") or importlib.metadata.entry_points(group="jax_plugins")
    if jax.config.jax_platforms is None and not plugins:
        jax.config.update("jax_platforms", "cpu")


def workdir(flag: str = "workdir") -> pathlib.Path:
    """The directory that the flag names, made if need be and known to be writable."""
    if not flags.FLAGS[flag].value:
        raise DataError(f"--{flag}=DIR is required")
    if "://" in flags.FLAGS[flag].value:
        raise DataError(f"--{flag}={flags.FLAGS[flag].value} is no path; mount the bucket and give the folder it is on")
    path = pathlib.Path(flags.FLAGS[flag].value).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # now, not after an hour of work
            pass
    except OSError as error:
        raise DataError(f"--{flag}={path} cannot be written to: {error.strerror or error}") from error
    return path


def use_compilation_cache(directory: str, fallback: pathlib.Path) -> None:
    """Compiled programs are kept and found again by the next run."""
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(directory) if directory else fallback))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# ---------------------------------------------------------------------------------------------- the config file


def _parse(argv: list[str], config_class: type | None = None, default_config: str | None = None) -> list[str]:
    """absl's parser, after a look of our own at the config file: ml_collections hides where an error in it arose."""
    path = config_path(argv)
    if path is None and default_config is not None:
        path, argv = default_config, [argv[0], f"--{CONFIG}={default_config}", *argv[1:]]
    if path is None and not any(re.match(r"--?(help|helpshort|helpfull)\b", a) for a in argv):
        raise DataError("--config=configs/X.py is required")
    if path is not None:
        _check_overrides(argv, load_config_file(path), config_class)
    try:
        return flags.FLAGS(argv)
    except (flags.Error, TypeError, ValueError, AttributeError, KeyError, OSError) as error:
        raise DataError(f"command line: {error}") from error


def config_path(argv: list[str]) -> str | None:
    """The value of --config; of the last one, as absl takes it."""
    path = None
    for arg, following in itertools.zip_longest(argv[1:], argv[2:]):
        if arg == "--":
            break
        name, equals, value = arg.partition("=")
        if name in (f"-{CONFIG}", f"--{CONFIG}"):
            path = value if equals else following
    return path


def load_config_file(path: str) -> ConfigDict:
    """What `get_config()` of a file returns; `file.py:word` calls get_config(word). DataError with file and line."""
    file, colon, word = path.partition(":")
    if not pathlib.Path(file).is_file():
        siblings = sorted(str(p) for p in pathlib.Path(file).parent.glob("*.py"))
        raise DataError(f"config file {file} does not exist{_did_you_mean(file, siblings)}")
    spec = importlib.util.spec_from_file_location("config_file", file)
    if spec is None:
        raise DataError(f"config file {file} is not a Python file (.py)")
    module = sys.modules["config_file"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        config = get_config and (get_config(word) if colon else get_config())
    except Exception as error:  # whatever the user's file raises is the user's to mend
        raise DataError(f"{_place(error, file)}: {type(error).__name__}: {_first_line(error)}") from error
    if get_config is None:
        raise DataError(f"config file {file} has no function get_config()")
    if not isinstance(config, ConfigDict):
        raise DataError(f"{file}: get_config() must return a ConfigDict, got {type(config).__name__}")
    return config


def _place(error: Exception, file: str) -> str:
    """Where in the user's file an error arose; in another file only if that one does not parse."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    here = pathlib.Path(file).resolve()
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if pathlib.Path(f.filename).resolve() == here]
    return f"{file}, line {lines[-1]}" if lines else file


def _first_line(error: Exception) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return text.strip().splitlines()[0] if text and text.strip() else "no message"


def _check_overrides(argv: list[str], config: ConfigDict, config_class: type | None) -> None:
    """One DataError for all overrides of fields that do not exist, with what is wrong in the file itself."""
    known = _fields(config)
    matches = [m for arg in argv[1:] if (m := re.match(rf"--?(?:no)?{CONFIG}\.([^=]+)=?(.*)", arg))]
    given = {m.group(1): m.group(2) for m in matches}
    unknown = [name for name in given if name not in known and "[" not in name]
    problems = [f"unknown field --{CONFIG}.{n}{_did_you_mean(n, known, f'--{CONFIG}.')}" for n in unknown]
    if problems and config_class is not None:
        for name in set(given) - set(unknown):  # a required field that the command line fills is not missing
            with contextlib.suppress(TypeError, KeyError, AttributeError):
                if operator.attrgetter(name)(config) is None:
                    config.update_from_flattened_dict({name: given[name]})
        config_lib.build(config_class, config, problems)
    if problems:
        raise DataError("config: " + "; ".join(problems))


def _fields(values: Any, prefix: str = "") -> list[str]:
    """Dotted names of all fields and groups."""
    out = []
    for key, value in values.items():
        out += [f"{prefix}{key}"] + (_fields(value, f"{prefix}{key}.") if hasattr(value, "items") else [])
    return out


def _did_you_mean(name: str, known: list[str], prefix: str = "") -> str:
    """The closest name; failing that the one whose last part is closest (`--config.lr` for `sft.optim.lr`)."""
    tails = {leaf.rpartition(".")[2]: leaf for leaf in reversed(known)}
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    close = close or [tails[t] for t in difflib.get_close_matches(name.rpartition(".")[2], list(tails), n=1)]
    return f"; did you mean {prefix}{close[0]}?" if close else ""
