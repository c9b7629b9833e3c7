"""Stored trajectories: ArrayRecord shards that Grain reads at random, one record per trajectory.

A record is an uncompressed .npz: ids, positions and the sampled mark, and a JSON header with the id, the IoU, where it
came from and the environment's replay record. The images that the policy saw are made again from the replay and the
picture's own file, which the header names together with a checksum of its pixels; a picture that is no file of its own
is in the record. Patches are made when read.
"""

import contextlib
import dataclasses
import json
import pathlib
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from rsagent_jax.agent.environment import EnvState, read_before
from rsagent_jax.agent.replay import read_source, replay, state_to_json
from rsagent_jax.agent.views import PixelLimits
from rsagent_jax.config.build import to_dict
from rsagent_jax.config.schema import AgentConfig
from rsagent_jax.data.npz import pack_record, read_arrays
from rsagent_jax.data.packing import Item
from rsagent_jax.data.processor import Processor, image_patches
from rsagent_jax.data.records import ArrayRecords
from rsagent_jax.data.shards import open_array_record
from rsagent_jax.models.qwen25_vl.config import read_json
from rsagent_jax.models.qwen25_vl.positions import merged_tokens
from rsagent_jax.runtime import local_copies, paths
from rsagent_jax.runtime.image_files import checksum, png, read_image
from rsagent_jax.types import DataError, Trajectory

STAMP = "collect.json"  # written last: a directory without it is not complete
_AGAIN = "collect the set again"
_MOVED = "stored trajectories refer to it; put it back, or name its new place: rsagent_jax.refilter --root"


def encode_by_reference(
    state: EnvState, path: str, header: dict, played: Trajectory, more: Mapping[str, np.ndarray] | None = None
) -> bytes:
    """A finished trajectory, `played` by the driver into `state`, whose images are made again when it is read.

    `path` names its picture, "" = no file. more: arrays that the record holds as well: logprobs and advantages, f32[T].
    """
    arrays = {"tokens": played.tokens, "positions": played.positions, "sampled": played.loss_mask}
    arrays |= more or {}
    image = {"path": path, "sha256": checksum(state.image)}
    header = header | {"picture": image, "replay": state_to_json(state, path)}
    return pack_record(header, arrays if path else arrays | {"source": np.frombuffer(png(state.image), np.uint8)})


def shown_images(state: EnvState) -> list[np.ndarray]:
    """What the policy was shown before its last turn, in order: u8[h, w, 3] each."""
    return [image for turn in range(max(1, len(state.turns))) for image in read_before(state, turn)[1]]


def decode_record(record: bytes, processor: Processor, turns: str = "all") -> Item:
    """The training item of a record; `turns` as SftConfig.turns.

    DataError when it is broken, or made with another tokenizer or image settings.
    """
    try:
        arrays = read_arrays(record)
        header, images, limits = json.loads(arrays["header"].tobytes()), [], None
        if "picture" in header:
            if "source" in arrays:
                image = read_image(arrays["source"].tobytes(), _AGAIN, where="the picture in a stored trajectory")
            else:
                image = read_source(header["replay"], header["picture"]["path"], _MOVED)
            state = replay(header["replay"], image)
            images, limits = shown_images(state), state.limits
        tokens, positions, loss_mask = arrays["tokens"], arrays["positions"], arrays["sampled"]
        if turns == "useful":
            loss_mask = _without_useless(loss_mask, header)
    except DataError:
        raise
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"a stored trajectory cannot be read ({error}); {_AGAIN}") from error
    patched = [image_patches(image, processor.images, limits) for image in images]
    grids = tuple(grid for _, grid in patched)
    wanted = sum(merged_tokens(grid, processor.images.merge_size) for grid in grids)
    found = int(((tokens == processor.image_id) & ~loss_mask).sum())
    if found != wanted or tokens.max(initial=0) >= processor.config.text.vocab_size:
        raise DataError(
            f"a stored trajectory has {found} image tokens where its pictures take {wanted}, or ids beyond the"
            " vocabulary: it was collected with another tokenizer or other image settings; collect the set again"
        )
    patches = np.concatenate([p for p, _ in patched]) if patched else processor.no_patches()
    logprobs = arrays.get("logprobs", np.zeros(len(tokens), np.float32))
    return Item(tokens, positions, loss_mask, logprobs, patches, grids, arrays.get("advantages", 0.0))


def _without_useless(sampled: np.ndarray, header: dict) -> np.ndarray:
    """bool[T]: `sampled` of the turns that are worth imitating alone."""
    if "useful" not in header:
        raise DataError(f"a stored trajectory does not say which of its turns are useful (sft.turns); {_AGAIN}")
    first = sampled & ~np.append(False, sampled[:-1])  # something is forced between any two turns
    turn = np.cumsum(first) - 1
    return sampled & np.array([*header["useful"], False])[turn]


def record_header(record: bytes) -> dict:
    """DataError for a damaged record."""
    try:
        return json.loads(read_arrays(record)["header"].tobytes())
    except (KeyError, ValueError) as error:
        raise DataError(f"a stored trajectory cannot be read ({error}); {_AGAIN}") from error


def picture_paths(directory: str | pathlib.Path) -> list[str]:
    """The file of every stored trajectory's picture, "" for one that is no file of its own."""
    records = open_records(directory)
    headers = (record_header(records[i]) for i in range(len(records)))
    return [header.get("picture", {}).get("path", "") for header in headers]


class RecordWriter:
    """Writes a set. The stamp is written by `close`, so an interrupted set is not taken for a complete one."""

    def __init__(self, directory: pathlib.Path, per_file: int = 1 << 30):
        """`per_file`: records in one ArrayRecord file."""
        paths.make_directory(directory)
        paths.remove_file(directory / STAMP)
        for old in directory.glob("trajectories-*.array_record"):
            paths.remove_file(old)
        self.directory, self.per_file = directory, per_file
        self.local = pathlib.Path(tempfile.mkdtemp()) if paths.is_remote(directory) else directory
        self.records = 0
        self.writer = self._open()

    def _open(self) -> ArrayRecordWriter:
        number = self.records // self.per_file
        return ArrayRecordWriter(str(self.local / f"trajectories-{number:05d}.array_record"), "group_size:1")

    def write(self, record: bytes) -> None:
        """DataError where it, or an earlier one, cannot be written; as of `close`."""
        with self._writing():
            if self.records and self.records % self.per_file == 0:
                self.writer.close()
                self.writer = self._open()
            self.writer.write(record)
        self.records += 1

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with paths.writing(self.directory):
            try:
                yield
            except RuntimeError as error:  # of ArrayRecord's, whatever it was
                raise OSError(paths.storage_problem(error)) from None

    def close(self, stamp: dict) -> None:
        with self._writing():
            self.writer.close()
        if self.local != self.directory:
            local_copies.put_files(self.local, self.directory)
            shutil.rmtree(self.local)
        paths.write_whole(self.directory / STAMP, json.dumps({"records": self.records, **stamp}, indent=2) + "\n")


def shown_with(agent: AgentConfig, limits: PixelLimits) -> dict[str, Any]:
    """Of a set's stamp: what `check_collected` holds against a run's own settings."""
    return {"config": {"agent": to_dict(agent), "pixel_limits": dataclasses.asdict(limits)}}


def check_collected(directory: str | pathlib.Path, agent: AgentConfig, limits: PixelLimits) -> None:
    """DataError unless the set was collected with the prompt, overlays and views that training shows: those of `agent`,
    under the pixel `limits` of the run's weights and config. A set that does not say is let through with a note."""
    collected = read_json(paths.open_path(directory) / STAMP).get("config", {})
    here = {"agent.prompt": agent.prompt, "agent.history_size": agent.history_size}
    here |= {name: getattr(limits, name) for name in ("min_pixels", "max_pixels")}
    try:
        there = {f"agent.{name}": collected["agent"][name] for name in ("prompt", "history_size")}
        there |= {name: collected["pixel_limits"][name] for name in ("min_pixels", "max_pixels")}
    except (KeyError, TypeError):
        print(f"note: {directory}/{STAMP} does not say with which prompt and sizes its trajectories were collected")
        return
    if differ := [f"{name}: {there[name]!r} there, {here[name]!r} here" for name in here if there[name] != here[name]]:
        raise DataError(
            f"{directory} was collected with other settings than this run's ({'; '.join(differ)}): the policy would be"
            " trained on what it will not be shown. Set these fields as there, or collect the set again"
        )


def open_records(directory: str | pathlib.Path) -> ArrayRecords:
    """Random access to a stored set; DataError when it is not there or not complete."""
    directory = paths.open_path(directory)
    if not (directory / STAMP).exists():
        raise DataError(
            f"{directory} holds no complete set of trajectories ({STAMP} is missing);"
            " make one with: python -m rsagent_jax.collect --config=configs/collect_quickstart.py"
            f" --workdir={shlex.quote(str(directory))}"
        )
    directory = local_copies.fetch_folder(directory, ("*.array_record", STAMP))
    try:
        stated = int(read_json(directory / STAMP)["records"])
        source = ArrayRecords(sorted(map(str, directory.glob("*.array_record"))))
        count = len(source)
    except (KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
        for shard in sorted(directory.glob("*.array_record")):
            open_array_record(shard, "collect the set again, or refilter it")
        raise DataError(f"{directory}: the set cannot be read ({error!r}); {_AGAIN}") from error
    if count != stated or stated == 0:
        raise DataError(f"{directory}: {count} trajectories on disk, {STAMP} says {stated}; {_AGAIN}")
    return source
