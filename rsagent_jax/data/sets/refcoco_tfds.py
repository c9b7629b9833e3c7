"""RefCOCO, RefCOCO+ and RefCOCOg as TensorFlow Datasets prepares them (`ref_coco` 1.1.0), read without TensorFlow.

    <root>/ref_coco/refcocog_umd/1.1.0/ref_coco-train.tfrecord-00000-of-00016      or .array_record-
    (<root> may also be one of the folders below it)

One record per picture: a tf.train.Example with the JPEG, and per object a PNG mask and the sentences' own text (`raw`;
the normalised text of refer is not in there). A record is walked once when the set is opened, texts and numbers are
kept, pictures and masks are decoded when a sample is asked for. TFDS does not keep ref_ids, so sample ids read
"<dataset>/<split_by>/<split>/ann<annotation id>/<sentence id>".
"""

from __future__ import annotations

import dataclasses
import functools
import mmap
import pathlib
import re
import struct
from collections.abc import Iterator

from array_record.python.array_record_module import ArrayRecordReader

from rsagent_jax.data.sets.index import Inputs, SampleIndex, coco_key
from rsagent_jax.data.sets.refcoco import UNITS
from rsagent_jax.data.shards import open_array_record
from rsagent_jax.runtime.image_files import decode_image
from rsagent_jax.types import DataError, Sample
from sam_bridge.file_kinds import kind_of_file

_SPLITS = {"val": "validation"}  # TFDS's word for it
_FIELDS = {
    "image": bytes, "image/id": int, "objects/id": int, "objects/mask": bytes,
    "objects/refexp/raw/ragged_flat_values": bytes, "objects/refexp/raw/ragged_row_lengths_0": int,
    "objects/refexp/refexp_id/ragged_flat_values": int,
}  # fmt: skip
_AGAIN = "copy it again or prepare the data set again"
_FILE = re.compile(r"ref_coco-(?P<split>\w+)\.(?P<format>tfrecord|array_record)-(?P<shard>\d{5})-of-(?P<count>\d{5})")


@dataclasses.dataclass(frozen=True)
class _Entry:
    id: str
    query: str
    image_id: int
    file: str
    record: int  # number in an ArrayRecord; byte offset in a TFRecord
    target: int  # which object of the picture

    @property
    def picture_key(self) -> str:
        return coco_key(self.image_id)

    def inputs(self) -> Inputs:
        path = pathlib.Path(self.file)
        fields = _example(_record(path, self.record), f"{path}, picture {self.image_id}")
        return Inputs(bytes(fields["image"][0]), bytes(fields["objects/mask"][self.target]))


def load_refcoco_tfds(
    root: str | pathlib.Path,
    dataset: str = "refcocog",
    split_by: str = "umd",
    split: str = "val",
    unit: str = "sentence",
    limit: int | None = None,
    raw: bool = False,
) -> SampleIndex:
    """Indexes one split; `unit`, `limit` and `raw` as in `refcoco.load_refcoco`, but the text is `raw` in lower case
    where `raw` is False. DataError where files are missing or broken.
    """
    if unit not in UNITS:
        raise DataError(f"unit must be 'sentence' or 'reference', not {unit!r}")
    entries: list[_Entry] = []
    for file in _shards(pathlib.Path(root).expanduser(), dataset, split_by, split):
        for number, record in _records(file):
            entries += _entries(file, number, record, f"{dataset}/{split_by}/{split}", unit, raw)
            if limit is not None and len(entries) >= limit:
                return SampleIndex(f"{dataset}/{split_by}/{split}", entries[:limit], _load)
    return SampleIndex(f"{dataset}/{split_by}/{split}", entries, _load)


def _load(entry: _Entry) -> Sample:
    path = pathlib.Path(entry.file)
    where = f"{path}, picture {entry.image_id}"
    fields = _example(_record(path, entry.record), where)
    image = decode_image(bytes(fields["image"][0]), where)
    # not 0, whatever it is: TFDS's own rule; it writes PNGs of 8 bits
    mask = decode_image(bytes(fields["objects/mask"][entry.target]), f"{where}, mask {entry.target}")[..., 0] > 0
    if mask.shape != image.shape[:2]:
        raise DataError(f"{where}: its mask {entry.target} has {mask.shape} pixels (h, w), it has {image.shape[:2]}")
    return Sample(id=entry.id, image=image, query=entry.query, gt_mask=mask)


def _entries(file: pathlib.Path, number: int, record, name: str, unit: str, raw: bool) -> Iterator[_Entry]:
    """One per sentence, or per object with unit="reference"."""
    where = f"{file}, record {number}"
    fields = _example(record, where)
    lengths = fields["objects/refexp/raw/ragged_row_lengths_0"]
    texts, ids = (fields[f"objects/refexp/{f}/ragged_flat_values"] for f in ("raw", "refexp_id"))
    objects = fields["objects/id"]
    if not len(objects) == len(fields["objects/mask"]) == len(lengths) or not sum(lengths) == len(texts) == len(ids):
        raise DataError(f"{where}: objects, masks and sentences do not match in number; prepare the data set again")
    first = 0
    for k, (ann_id, count) in enumerate(zip(objects, lengths, strict=True)):
        for s in range(first, first + (count if unit == "sentence" else min(count, 1))):
            try:
                text = bytes(texts[s]).decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: sentence {ids[s]} is not UTF-8 ({error})") from None
            query = text if raw else text.lower()
            yield _Entry(f"{name}/ann{ann_id}/{ids[s]}", query, fields["image/id"][0], str(file), number, k)
        first += count


# ---------------------------------------------------------------------------------------------------- files


def _shards(root: pathlib.Path, dataset: str, split_by: str, split: str) -> list[pathlib.Path]:
    config = f"{dataset.replace('+', 'plus')}_{split_by}"
    folders = [root / "ref_coco" / config, root / config, root]
    versions = [p for f in folders if f.is_dir() for p in sorted(f.glob("[0-9]*.[0-9]*.[0-9]*"), key=_version)]
    if root.is_dir() and any(_FILE.fullmatch(p.name) for p in root.iterdir()):  # the version's own folder
        versions = [root]
    if not versions:
        raise DataError(
            f"no prepared TFDS ref_coco/{config} under {root}. Expected {root / 'ref_coco' / config / '1.1.0'}; prepare"
            f" it with tensorflow-datasets: tfds build ref_coco/{config} --manual_dir=…"
        )
    folder, wanted = versions[-1], _SPLITS.get(split, split)
    files = [(m, p) for p in sorted(folder.iterdir()) if (m := _FILE.fullmatch(p.name))]
    found = [p for m, p in files if m["split"] == wanted]
    if not found:
        there = ", ".join(sorted({m["split"] for m, _ in files})) or "no records at all"
        raise DataError(f"{folder} has nothing in split {wanted!r}. It has: {there}")
    count = int(next(m["count"] for m, p in files if p == found[0]))
    if len(found) != count:
        raise DataError(f"{folder}: {len(found)} of the {count} files of split {wanted!r} are there; copy all of them")
    return found


def _version(path: pathlib.Path) -> tuple[int, ...]:
    return tuple(int(part) for part in path.name.split(".") if part.isdigit())


def _records(file: pathlib.Path) -> Iterator[tuple[int, memoryview | bytes]]:
    """(number, record) of every record of a file."""
    if ".array_record-" in file.name:
        reader = _array_record(file)
        for number in range(reader.num_records()):
            yield number, reader.read([number])[0]
        return
    view, offset = _mapped(file), 0
    while offset < len(view):
        record = _tf_record(view, offset, file)
        yield offset, record
        offset += len(record) + 16


def _record(file: pathlib.Path, number: int) -> memoryview | bytes:
    if ".array_record-" in file.name:
        return _array_record(file).read([number])[0]
    return _tf_record(_mapped(file), number, file)


@functools.lru_cache(maxsize=64)  # per process: an open file does not travel to a worker, its name does
def _mapped(file: pathlib.Path) -> memoryview:
    try:
        with file.open("rb") as f:
            return memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise DataError(f"cannot read {file}: {kind_of_file(file) or error}; {_AGAIN}") from None


@functools.lru_cache(maxsize=64)
def _array_record(file: pathlib.Path) -> ArrayRecordReader:
    return open_array_record(file, _AGAIN)


def _tf_record(view: memoryview, offset: int, file: pathlib.Path) -> memoryview:
    """A TFRecord is length (8 bytes), its checksum (4), the data, the data's checksum (4). The first one is checked;
    the data's would cost more than reading it, and broken pictures are noticed when they are decoded."""
    if offset + 12 <= len(view):
        length, checksum = struct.unpack("<QI", view[offset : offset + 12])
        if checksum == _masked_crc(bytes(view[offset : offset + 8])) and offset + 16 + length <= len(view):
            return view[offset + 12 : offset + 12 + length]
    what = kind_of_file(file) or f"damaged or cut short at byte {offset}"
    raise DataError(f"{file} is not a whole TFRecord file: {what}; {_AGAIN}")


@functools.cache
def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)  # CRC-32C, reflected
        table.append(value)
    return table


def _masked_crc(data: bytes) -> int:
    crc, table = 0xFFFFFFFF, _crc_table()
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 255]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF  # TFRecord's mask


# ---------------------------------------------------------------------------------------------------- tf.train.Example


def _example(record: memoryview | bytes, where: str) -> dict[str, list]:
    """The wanted features of a tf.train.Example: lists of memoryviews or ints."""
    found: dict[str, list] = {}
    try:
        view = memoryview(record)
        for _, features in _fields(view, 1):
            for _, pair in _fields(features, 1):
                parts = dict(_fields(pair))
                name = bytes(parts[1]).decode()
                if name in _FIELDS:
                    found[name] = _values(parts[2])
    except (IndexError, KeyError, ValueError, TypeError, struct.error) as error:
        raise DataError(f"{where} is not a tf.train.Example ({error!r}); prepare the data set again") from None
    if "objects/mask" not in found and "objects/id" in found:
        raise DataError(f"{where} has no masks: this is ref_coco 1.0.0; prepare version 1.1.0 with tensorflow-datasets")
    wrong = [n for n, kind in _FIELDS.items() if not all(isinstance(v, int) == (kind is int) for v in found.get(n, ()))]
    missing = [name for name in _FIELDS if name not in found] + [n for n in ("image", "image/id") if not found.get(n)]
    if missing or wrong:
        raise DataError(f"{where} has no proper {', '.join(missing + wrong)}: this is not a record of TFDS ref_coco")
    return found


def _values(feature: memoryview) -> list:
    """Feature: 1 = BytesList, 2 = FloatList (not read), 3 = Int64List; a list's field 1 holds the values."""
    out: list = []
    for kind, values in _fields(feature):
        for _, value in _fields(values, 1):
            if kind == 1:
                out.append(value)
            elif kind == 3:
                out += [value] if isinstance(value, int) else _packed(value)
    return [v - (1 << 64) if isinstance(v, int) and v >> 63 else v for v in out]


def _packed(data: memoryview) -> list[int]:
    out, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        out.append(value)
    return out


def _fields(data: memoryview, only: int | None = None) -> Iterator[tuple[int, memoryview | int]]:
    """(number, value) of a protobuf message's fields: bytes as memoryviews, varints as integers."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
        elif wire == 2:
            length, at = _varint(data, at)
            value, at = data[at : at + length], at + length
            if at > len(data):
                raise ValueError("a field is longer than its message")
        elif wire in (1, 5):
            width = 8 if wire == 1 else 4
            value, at = data[at : at + width], at + width
        else:
            raise ValueError(f"wire type {wire}")
        if only is None or number == only:
            yield number, value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
