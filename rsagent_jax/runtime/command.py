"""What every command shares: flags, one clear error for bad input, and the compilation cache."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict

from rsagent_jax.config import overrides
from rsagent_jax.config.build import build_config
from rsagent_jax.config.import_path import first_line, place
from rsagent_jax.config.schema import TrainConfig
from rsagent_jax.types import DataError
from sam_bridge.types import SegmenterError

CONFIG = "config"


def define_flags(directory: str = "workdir") -> None:
    """--config and the directory that the command writes to."""
    flags.DEFINE_string(CONFIG, None, "A file of configs/; --config.a.b=value sets one of its fields.")
    flags.DEFINE_string(directory, None, "Directory for everything this command leaves behind.")


def run_command(
    main: Callable[..., Any], config_class: type, arguments: tuple[str, ...] = (), default_config: str | None = None
) -> None:
    """Parses the flags, builds the config, calls `main(config, *arguments)`.

    Bad input is one message on stderr and exit status 2; Ctrl-C is 130; else what `main` returns, None being 0.
    `arguments` names what the command takes besides flags.
    """

    config = None

    def parse(argv: list[str]) -> list[str]:
        nonlocal config
        config, rest = _parse(argv, config_class, default_config)
        return rest

    def start(argv: list[str]) -> None:
        quieten()
        given = argv[1:]
        if len(given) > len(arguments):
            hint = "; an override starts with --config." if "=" in given[-1] else ""
            raise DataError(f"unexpected argument {given[len(arguments)]!r}{hint}")
        if len(given) < len(arguments):
            raise DataError(f"{arguments[len(given)]} is missing; the arguments are: {' '.join(arguments)}")
        if status := main(config, *given):
            sys.exit(status)

    try:
        app.run(start, flags_parser=parse)
    except (DataError, SegmenterError) as error:
        kind = "segmenter: " if isinstance(error, SegmenterError) else ""
        print(f"error: {kind}{error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        resumes = config_class is TrainConfig
        hint = "; run the same command again to go on from the last checkpoint" if resumes else ""
        print(f"stopped{hint}", file=sys.stderr)
        sys.exit(130)


def quieten() -> None:
    """Nothing on the terminal that a user can do nothing about; before the first use of a device."""
    import jax

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
    import jax  # commands that need no device start without it

    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(directory) if directory else fallback))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# ---------------------------------------------------------------------------------------------- the config file


def _parse(argv: list[str], config_class: type, default_config: str | None) -> tuple[Any, list[str]]:
    """The config, None where only help is wanted, and the arguments that are left when absl has taken its flags."""
    path, config = config_path(argv), None
    if path is None and default_config is not None:
        path, argv = default_config, [argv[0], f"--{CONFIG}={default_config}", *argv[1:]]
    if path is None and not any(re.match(r"--?(help|helpshort|helpfull)\b", a) for a in argv):
        raise DataError("--config=configs/X.py is required")
    if path is not None:
        values = load_config_file(path).to_dict()
        argv, problems = overrides.apply_overrides(argv, config_class, values)
        config = build_config(config_class, values, problems)
    try:
        return config, flags.FLAGS(argv)
    except flags.Error as error:
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
        raise DataError(f"config file {file} does not exist{overrides.did_you_mean(file, siblings)}")
    spec = importlib.util.spec_from_file_location("config_file", file)
    if spec is None:
        raise DataError(f"config file {file} is not a Python file (.py)")
    module = sys.modules["config_file"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        config = get_config and (get_config(word) if colon else get_config())
    except Exception as error:  # whatever the user's file raises is the user's to mend
        raise DataError(f"{place(error, file)}: {type(error).__name__}: {first_line(error)}") from error
    if get_config is None:
        raise DataError(f"config file {file} has no function get_config()")
    if not isinstance(config, ConfigDict):
        raise DataError(f"{file}: get_config() must return a ConfigDict, got {type(config).__name__}")
    return config
