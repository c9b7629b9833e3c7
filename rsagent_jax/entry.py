"""What every command shares: flags, one clear error for bad input, and the compilation cache."""

from __future__ import annotations

import difflib
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from rsagent_jax import config as config_lib
from rsagent_jax.types import DataError

CONFIG = "config"


def define_flags(default_config: str | None = None) -> None:
    """--config and --workdir."""
    config_flags.DEFINE_config_file(CONFIG, default_config)
    flags.DEFINE_string("workdir", None, "Directory for everything this command leaves behind.")


def run(main: Callable[[Any], None], config_class: type) -> None:
    """Parses the flags, builds the config, calls `main(config)`; bad input is one line on stderr and exit status 2."""

    def start(_) -> None:
        logging.set_verbosity(logging.WARNING)  # Orbax reports every file it touches
        if flags.FLAGS[CONFIG].value is None:
            raise DataError("--config=configs/X.py is required")
        main(config_lib.build(config_class, flags.FLAGS[CONFIG].value))

    try:
        app.run(start, flags_parser=_parse)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def workdir() -> pathlib.Path:
    if not flags.FLAGS.workdir:
        raise DataError("--workdir=DIR is required")
    path = pathlib.Path(flags.FLAGS.workdir)
    path.mkdir(parents=True, exist_ok=True)
    return path


def use_compilation_cache(directory: str, fallback: pathlib.Path) -> None:
    """Compiled programs are kept and found again by the next run."""
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(directory) if directory else fallback))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _parse(argv: list[str]) -> list[str]:
    """absl's parser, with a config file or field that does not exist as a DataError instead of a traceback."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        raise DataError(str(error)) from error
    except FileNotFoundError as error:
        raise DataError(f"config file not found: {error.filename or error}") from error
    except (AttributeError, KeyError) as error:  # how ml_collections says that --config.a.b does not exist
        wanted = re.findall(r"'([^']+)'", str(error))
        known = _leaves(flags.FLAGS[CONFIG].value) if flags.FLAGS[CONFIG].value is not None else []
        name = wanted[-1].strip("\"'") if wanted else str(error)
        raise DataError(f"--config has no field {name!r}{_closest(name, known)}") from error
    except (TypeError, ValueError) as error:
        raise DataError(f"command line: {error}") from error


def _leaves(values: Any, prefix: str = "") -> list[str]:
    out = []
    for key, value in values.items():
        out += _leaves(value, f"{prefix}{key}.") if hasattr(value, "items") else [f"{prefix}{key}"]
    return out


def _closest(name: str, known: list[str]) -> str:
    tails = {leaf.rpartition(".")[2]: leaf for leaf in known}
    close = difflib.get_close_matches(name.rpartition(".")[2], list(tails), n=1)
    return f"; did you mean --config.{tails[close[0]]}?" if close else ""
