"""What every loader returns: a lazy sequence of samples that knows its ids and pictures without decoding anything."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from rsagent_jax.agent.prompts import check_query
from rsagent_jax.agent.views import check_shape
from rsagent_jax.masks import decode_segmentation
from rsagent_jax.runtime.image_files import read_image
from rsagent_jax.runtime.paths import absolute_name, is_remote, open_path, read_bytes, remote_versions, storage_kind
from rsagent_jax.types import DataError, Sample
from sam_bridge.file_kinds import HEAD, kind_of

# COCO's file names of 2014 and 2017, so that a user's copy of a picture is known as the same picture.
_COCO_NAME = re.compile(r"(COCO_[a-z]+\d{4}_)?(\d{12})\.(?:jpg|jpeg|png)", re.IGNORECASE)
_COCO_FOLDER = re.compile(r"(?:train|val|test|unlabeled)20\d\d")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a sample is made of beside its question: a path for a file, bytes for what is no file of its own."""

    image: pathlib.Path | bytes
    target: pathlib.Path | bytes  # the mask's file, or the record that it is drawn from; b"" where nothing is meant
    ignore: pathlib.Path | bytes = b""


@dataclasses.dataclass(frozen=True)
class Entry:
    """What an index keeps of a sample: plain text and numbers. Each data set adds the fields that it loads by."""

    id: str
    query: str
    image: str  # the file that holds it

    @property
    def image_key(self) -> str:
        """A name that copies of one picture share: "coco/<image id>" by COCO's file names, else the absolute path."""
        known = _COCO_NAME.fullmatch(pathlib.PurePath(self.image).name)
        return f"coco/{int(known[2])}" if known else absolute_name(self.image)

    def inputs(self) -> Inputs:
        """Nothing is decoded for it."""
        raise NotImplementedError

    def load(self) -> Sample:
        """DataError for a picture or mask that is missing, broken or of another size than stated."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class SegmentedEntry(Entry):
    """Its mask is the union of COCO segmentations."""

    size: tuple[int, int]  # (h, w) that they are drawn for; held against the picture when it is read
    targets: tuple[list | dict, ...]

    remedy: ClassVar[str]  # where there is no picture

    def inputs(self) -> Inputs:
        return Inputs(open_path(self.image), json.dumps(self.targets, sort_keys=True).encode())

    def parts(self) -> Iterator[tuple[list | dict, str]]:
        """What is decoded one by one, and what it is called in messages."""
        # Polygons of all targets at once: a speck among them that covers no pixel makes no sample unreadable.
        polygons = [polygon for target in self.targets if isinstance(target, list) for polygon in target]
        for target in (*filter(None, [polygons]), *(t for t in self.targets if isinstance(t, dict))):
            yield target, f"sample {self.id}"

    def load(self) -> Sample:
        image, (h, w) = read_image(self.image, self.remedy), self.size
        if image.shape[:2] != (h, w):
            raise DataError(
                f"{self.image} is {image.shape[1]} x {image.shape[0]} pixels, but its masks are drawn for {w} x {h}"
                f" (sample {self.id}): use COCO's original pictures, not resized or rotated ones"
            )
        mask = np.zeros((h, w), bool)
        for segmentation, where in self.parts():
            mask |= decode_segmentation(segmentation, h, w, where)
        return Sample(self.id, image, self.query, mask, path=self.image)


@dataclasses.dataclass(eq=False, repr=False)  # a text of all entries helps nobody
class SampleIndex(Sequence):
    """A lazy, picklable sequence of samples: `len(index)`, `index[i]`.

    `index[i]` raises what its entry's `load` does, and DataError for a picture that no view can show; the index itself
    DataError where there is nothing, or two samples share an id.
    """

    name: str
    entries: Sequence[Entry]
    _: dataclasses.KW_ONLY
    notes: tuple[str, ...] = ()  # what was left out on the way here, and why
    # What `fingerprint` takes of a picture file: "content", its bytes; or "stat", path, size and time of change, where
    # reading every picture costs too much.
    image_hash: str = "content"
    parts: tuple[SampleIndex, ...] = ()  # of a mix: its sets, whose samples stand in it as often as they are drawn

    def __post_init__(self):
        if not self.entries:
            raise DataError(f"{self.name}: there is no sample in it")
        if not self.parts and (twice := [id for id, count in collections.Counter(self.ids).items() if count > 1]):
            raise DataError(
                f"{self.name}: {len(twice)} sample ids occur more than once, such as {twice[:3]}; every id must be"
                " unique: take the files from one download, or give each line of your own data an id of its own"
            )

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, i: int) -> Sample:
        entry = self.entries[i]
        try:
            check_query(entry.query)
        except DataError as error:
            raise DataError(f"sample {entry.id}: {error}") from None
        sample = entry.load()
        try:
            check_shape(*sample.image.shape[:2])  # which alone decides whether a view can show it (views.fit)
        except DataError as error:
            raise DataError(f"{sample.path or sample.id}: {error}") from None
        return sample

    @property
    def ids(self) -> list[str]:
        """Sample ids in order, without decoding anything."""
        return [entry.id for entry in self.entries]

    @property
    def image_keys(self) -> list[str]:
        """The pictures' names in order, by which sets are held against each other; see `Entry.image_key`."""
        return [entry.image_key for entry in self.entries]

    @property
    def pictures(self) -> list[str]:
        """The pictures of this set by which its figures are resampled: `image_keys`, but for those numbered as COCO's
        are that share a number and lie in several folders, such as one for each camera: they are the user's own."""
        keys, numbered = [entry.image_key for entry in self.entries], collections.defaultdict(set)
        for entry, key in zip(self.entries, keys, strict=True):
            path = pathlib.PurePath(entry.image)
            known = _COCO_NAME.fullmatch(path.name)
            if known and not known[1] and not _COCO_FOLDER.fullmatch(path.parent.name):
                numbered[key].add(entry.image)
        own = {image for images in numbered.values() if len(images) > 1 for image in images}
        return [absolute_name(e.image) if e.image in own else key for e, key in zip(self.entries, keys, strict=True)]

    def keep(self, wanted: Sequence[int], note: str = "") -> SampleIndex:
        """The samples at these places, in this order."""
        notes = (*self.notes, *filter(None, [note]))
        return dataclasses.replace(self, entries=[self.entries[i] for i in wanted], notes=notes)

    def fingerprint(self, i: int) -> str:
        """16 hex digits that change with what sample i is made of: id, query, target, ignored pixels, picture.

        Nothing is decoded. A file that is missing counts as missing: only `index[i]` raises.
        """
        entry = self.entries[i]
        inputs = entry.inputs()
        text = [part.encode("utf-8", "surrogatepass") for part in (entry.id, entry.query)]
        parts = [*text, _digest(inputs.image, self.image_hash), _digest(inputs.target), _digest(inputs.ignore)]
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def _digest(source: pathlib.Path | bytes, by: str = "content") -> bytes:
    """The checksum of a file's bytes, or (`by` "stat") what the file system says of it; or the bytes themselves."""
    if isinstance(source, bytes):
        return source
    try:
        if is_remote(source):  # the bucket keeps checksums
            return remote_versions(str(source.parent)).get(source.name, "missing").encode()
        stat = source.stat()
        if by == "stat":
            return f"{source} {stat.st_size} {stat.st_mtime_ns}".encode("utf-8", "surrogateescape")
        return _file_checksum(source, stat.st_size, stat.st_mtime_ns)
    except (OSError, ValueError) as error:  # of a name that no file can have
        return type(error).__name__.encode()


@functools.lru_cache(maxsize=1 << 17)  # many samples share a picture
def _file_checksum(path: pathlib.Path, size: int, mtime_ns: int) -> bytes:
    """`size` and `mtime_ns` are the key of the cache: a file that was changed is read again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def read_file(path: pathlib.Path) -> bytes:
    """DataError where it is missing or cannot be read."""
    try:
        return read_bytes(path)
    except OSError as error:
        wrong = storage_kind(error) if is_remote(path) else DataError
        raise wrong(f"cannot read {path}: {error.strerror or error}") from None


def parse_json(data: bytes, path: pathlib.Path) -> Any:
    """Of a file, or of a line of one. DataError where it is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        why = kind_of(data[:HEAD]) or f"{error}; cut short?"
        raise DataError(f"{path} is not JSON ({why}): download it again") from None


def spread(total: int, wanted: int) -> list[int]:
    """So many places out of `total`, evenly spread; all of them where `wanted` is 0."""
    return sorted({int(i) for i in np.linspace(0, total - 1, min(wanted or total, total))})
