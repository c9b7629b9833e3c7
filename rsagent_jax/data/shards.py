"""ArrayRecord shards, opened so that a broken one is a fault by name: the library takes it for one of 0 records."""

import pathlib

from array_record.python.array_record_module import ArrayRecordReader

from rsagent_jax.types import DataError
from sam_bridge.file_kinds import kind_of_file


def open_array_record(path: pathlib.Path, remedy: str) -> ArrayRecordReader:
    """A reader of at least one record; DataError that names the file."""
    try:
        reader = ArrayRecordReader(str(path))
        if reader.ok() and reader.num_records():
            return reader
        why = "it is cut short, damaged or without a record"
    except (OSError, RuntimeError, ValueError) as error:
        why = str(error)
    raise DataError(f"{path} is not a readable ArrayRecord file: {kind_of_file(path) or why}; {remedy}")
