"""Records of ArrayRecord files at random, damaged ones by name. Apart from shards.py, since grain brings jax along."""

import pathlib
from collections.abc import Sequence

import grain

from rsagent_jax.types import DataError


class ArrayRecords(grain.sources.ArrayRecordDataSource):
    """A sequence of records. DataError for one that cannot be read, whose bytes have changed on the disk."""

    def __init__(self, files: Sequence[str]):
        super().__init__(files)
        self.folder = pathlib.Path(files[0]).parent

    def __getitem__(self, index: int) -> bytes:
        try:
            return super().__getitem__(index)
        except RuntimeError as error:
            raise DataError(f"{self.folder}: record {index} is damaged ({error}); make the set again") from None
