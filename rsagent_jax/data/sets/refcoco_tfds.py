"""RefCOCO, RefCOCO+ and RefCOCOg as TensorFlow Datasets prepares them (`ref_coco` 1.1.0), read without TensorFlow.

    <root>/ref_coco/refcocog_umd/1.1.0/ref_coco-train.tfrecord-00000-of-00016      or .array_record-
    (<root> may also be one of the folders below it)

One record per picture: a tf.train.Example with the JPEG, and per object a PNG mask and the sentences' own text (`raw`;
the normalised text of refer is not in there). A record is read once when the set is opened, texts and numbers are
kept, pictures and masks are decoded when a sample is asked for. TFDS does not keep ref_ids, so sample ids read
"<dataset>/<split_by>/<split>/ann<annotation id>/<sentence id>".
"""

import dataclasses
import functools
import mmap
import pathlib
import re
from collections.abc import Iterator, Sequence

from rsagent_jax.data.records import ArrayRecords
from rsagent_jax.data.sets.index import Entry, Inputs
from rsagent_jax.data.shards import open_array_record
from rsagent_jax.runtime.image_files import read_image
from rsagent_jax.runtime.local_copies import fetch_folder
from rsagent_jax.types import DataError, Sample
from sam_bridge.file_kinds import kind_of_file

_FIELDS = {
    "image": "bytes_list", "image/id": "int64_list", "objects/id": "int64_list", "objects/mask": "bytes_list",
    "objects/refexp/raw/ragged_flat_values": "bytes_list", "objects/refexp/raw/ragged_row_lengths_0": "int64_list",
    "objects/refexp/refexp_id/ragged_flat_values": "int64_list",
}  # fmt: skip
_AGAIN = "copy it again or prepare the data set again"
_FILE = re.compile(r"ref_coco-(?P<split>\w+)\.(?:tfrecord|array_record)-\d{5}-of-(?P<count>\d{5})")


@dataclasses.dataclass(frozen=True)
class _Entry(Entry):  # its picture is in the file of a shard
    image_id: int  # COCO's
    record: int  # its number in the file
    target: int  # which object of the picture

    @property
    def image_key(self) -> str:
        return f"coco/{self.image_id}"

    def read(self) -> tuple[str, dict[str, list]]:
        """(where it is, for messages; its record's features)."""
        where = f"{self.image}, picture {self.image_id}"
        return where, _example(pathlib.Path(self.image), self.record, where)

    def inputs(self) -> Inputs:
        _, fields = self.read()
        return Inputs(fields["image"][0], fields["objects/mask"][self.target])

    def load(self) -> Sample:
        where, fields = self.read()
        image = read_image(fields["image"][0], _AGAIN, where=where)
        # not 0, whatever it is: TFDS's own rule; it writes PNGs of 8 bits
        mask = read_image(fields["objects/mask"][self.target], _AGAIN, where=f"{where}, mask {self.target}")[..., 0] > 0
        if mask.shape != image.shape[:2]:
            raise DataError(f"{where}: its mask {self.target} has {mask.shape} pixels (h, w), it has {image.shape[:2]}")
        return Sample(id=self.id, image=image, query=self.query, gt_mask=mask)


def read_entries(root: pathlib.Path, dataset: str, split_by: str, split: str, unit: str, raw: bool) -> Iterator[_Entry]:
    """What refcoco.load_refcoco asks for; the text is `raw` in lower case where `raw` is False."""
    for file in _shards(root, dataset, split_by, split):
        for number in range(len(_records(file))):
            yield from _of_picture(file, number, f"{dataset}/{split_by}/{split}", unit, raw)


def _of_picture(file: pathlib.Path, number: int, name: str, unit: str, raw: bool) -> Iterator[_Entry]:
    """One per sentence, or per object with unit="reference"."""
    where = f"{file}, record {number}"
    fields = _example(file, number, where)
    objects, lengths = fields["objects/id"], fields["objects/refexp/raw/ragged_row_lengths_0"]
    texts, ids = (fields[f"objects/refexp/{f}/ragged_flat_values"] for f in ("raw", "refexp_id"))
    if not len(objects) == len(fields["objects/mask"]) == len(lengths) or not sum(lengths) == len(texts) == len(ids):
        raise DataError(f"{where}: objects, masks and sentences do not match in number; prepare the data set again")
    first = 0
    for k, (ann_id, count) in enumerate(zip(objects, lengths, strict=True)):
        for s in range(first, first + (count if unit == "sentence" else min(count, 1))):
            try:
                text = texts[s].decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: sentence {ids[s]} is not UTF-8 ({error})") from None
            query = text if raw else text.lower()
            yield _Entry(f"{name}/ann{ann_id}/{ids[s]}", query, str(file), fields["image/id"][0], number, k)
        first += count


def _example(file: pathlib.Path, number: int, where: str) -> dict[str, list]:
    """The wanted features of a tf.train.Example by name: lists of bytes or integers."""
    from tensorflow_datasets.proto import tf_example_pb2  # takes half a second

    records = _records(file)
    try:
        features = tf_example_pb2.Example.FromString(bytes(records[number])).features.feature
    except Exception as error:  # noqa: BLE001 a damaged chunk of the file; protobuf's DecodeError, which has many homes
        raise DataError(f"{where} is not a tf.train.Example ({error!r}); prepare the data set again") from None
    if "objects/mask" not in features and "objects/id" in features:
        raise DataError(f"{where} has no masks: this is ref_coco 1.0.0; prepare version 1.1.0 with tensorflow-datasets")
    fields = {
        name: list(getattr(features[name], kind).value)
        for name, kind in _FIELDS.items()
        if name in features and features[name].WhichOneof("kind") in (kind, None)  # None: an empty list
    }
    if wrong := [n for n in _FIELDS if n not in fields or not (fields[n] or n.startswith("objects/"))]:
        raise DataError(f"{where} has no proper {', '.join(wrong)}: this is not a record of TFDS ref_coco")
    return fields


# ---------------------------------------------------------------------------------------------------- files


def _shards(root: pathlib.Path, dataset: str, split_by: str, split: str) -> list[pathlib.Path]:
    config = f"{dataset.replace('+', 'plus')}_{split_by}"
    versions = [root] if any(_FILE.fullmatch(path.name) for path in root.glob("ref_coco-*")) else []  # its own folder
    for folder in () if versions else (root / "ref_coco" / config, root / config, root):
        numbered = folder.glob("[0-9]*.[0-9]*.[0-9]*")
        versions += sorted(numbered, key=lambda path: [int(part) for part in path.name.split(".") if part.isdigit()])
    if not versions:
        raise DataError(
            f"no prepared TFDS ref_coco/{config} under '{root}'. Expected {root / 'ref_coco' / config / '1.1.0'};"
            f" prepare it with tensorflow-datasets: tfds build ref_coco/{config} --manual_dir=…"
        )
    folder, wanted = versions[-1], "validation" if split == "val" else split
    files = [(match, path) for path in sorted(folder.iterdir()) if (match := _FILE.fullmatch(path.name))]
    shards = [(path, int(match["count"])) for match, path in files if match["split"] == wanted]
    if not shards:
        there = ", ".join(sorted({match["split"] for match, _ in files})) or "no records at all"
        raise DataError(f"{folder} has nothing in split {wanted!r}. It has: {there}")
    if len(shards) != (count := shards[0][1]):
        raise DataError(f"{folder}: {len(shards)} of the {count} files of split {wanted!r} are there; copy all of them")
    copy = fetch_folder(folder, (f"ref_coco-{wanted}.*",))
    return [copy / path.name for path, _ in shards]


@functools.lru_cache(maxsize=64)  # per process: an open file does not travel to a worker, its name does
def _records(file: pathlib.Path) -> Sequence[bytes | memoryview]:
    """A file's records, at random, none of them read yet. DataError where it is not whole."""
    if ".array_record-" in file.name:
        open_array_record(file, _AGAIN)
        return ArrayRecords([str(file)])
    try:
        with file.open("rb") as f:
            data = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise DataError(f"cannot read {file}: {kind_of_file(file) or error}; {_AGAIN}") from None
    records, start = [], 0
    while start < len(data):  # length (8 bytes), its checksum (4), the record, its checksum (4)
        end = start + 12 + int.from_bytes(data[start : start + 8], "little")
        if end + 4 > len(data):
            what = kind_of_file(file) or f"damaged or cut short at byte {start}"
            raise DataError(f"{file} is not a whole TFRecord file: {what}; {_AGAIN}")
        records.append(data[start + 12 : end])
        start = end + 4
    return records
