"""The one way to samples: train.py, evaluate.py and collect all open what their `data` names here."""

import dataclasses
import inspect
import itertools
from collections.abc import Sequence

from rsagent_jax.config.data import DataConfig, MixPart
from rsagent_jax.config.import_path import first_line, import_path, place
from rsagent_jax.config.ranges import DATASETS
from rsagent_jax.data.sets.index import SampleIndex
from rsagent_jax.runtime.paths import bucket_problem
from rsagent_jax.types import DataError

# Fields that a loader gets if it has parameters so named.
OPTIONS = ("dataset", "layout", "split_by", "unit", "texts", "raw")


def open_samples(config: DataConfig, field: str = "data") -> SampleIndex:
    """What the config names, lazily. DataError where it names nothing, or files are missing or broken.

    field: where it stands in the config of the command, for messages.
    """
    if not config.mix:
        samples = _excluding(_open(config, f"{field}.root"), config, field)
        return dataclasses.replace(samples, image_hash=config.fingerprint)
    parts = []
    for part in config.mix:
        inherited = dataclasses.replace(part.data, root=part.data.root or config.root)
        here = f"{field}.mix.{part.name}.data"
        opened = _open(inherited, f"{field}.root", f"{here}.root")
        samples = _excluding(_excluding(opened, inherited, here), config, field)
        parts.append((part, dataclasses.replace(samples, image_hash=part.data.fingerprint)))
    return _mixed(parts)


def _mixed(parts: Sequence[tuple[MixPart, SampleIndex]]) -> SampleIndex:
    """Several sets in one: drawn from evenly, part p comes up with its share of the weights.

    Its length is the shortest at which every sample stands in it once and the shares hold: parts that are small for
    their weight are repeated. So whatever shuffles or divides a plain sequence does the same for a mix.
    """
    total, sets = sum(part.weight for part, _ in parts), tuple(samples for _, samples in parts)
    length = max(len(samples) * total / part.weight for part, samples in parts)
    counts = [max(len(samples), round(length * part.weight / total)) for part, samples in parts]
    repeated = (itertools.islice(itertools.cycle(s.entries), n) for n, s in zip(counts, sets, strict=True))
    name = " + ".join(f"{n} of {s.name}" for n, s in zip(counts, sets, strict=True))
    notes = tuple(f"{s.name}: {note}" for s in sets for note in s.notes)
    return SampleIndex(name, list(itertools.chain(*repeated)), notes=notes, parts=sets)


def _open(c: DataConfig, *fields: str) -> SampleIndex:
    """By a word of the table, or a loader of the user's own: both are called with (root=…, split=…, limit=…).

    fields: that may name its root.
    """
    if not c.root and c.dataset in DATASETS:  # one of the user's own may need none
        raise DataError(f"{' or '.join(fields)} is not given: --config.{fields[-1]}=DIR, the folder of {c.dataset}")
    path = DATASETS.get(c.dataset, c.dataset)
    # Pictures are excluded before samples are counted, so `limit` waits until then.
    arguments = {"root": c.root, "split": c.split, "limit": None if c.exclude else c.limit or None}
    parameters = inspect.signature(import_path(path)).parameters
    arguments |= {name: getattr(c, name) for name in OPTIONS if name in parameters}
    load = import_path(path, (), arguments)
    try:
        samples = load(**arguments)
    except DataError:
        raise
    except Exception as error:  # whatever the user's function raises is the user's to mend
        if bucket_problem(error):
            raise
        at = place(error, inspect.getsourcefile(load) or path)
        raise DataError(f"data.dataset {path!r} failed: {at}: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(samples, SampleIndex):
        raise DataError(f"data.dataset {path!r} returned a {type(samples).__name__}, not a SampleIndex")
    return samples


def _excluding(samples: SampleIndex, c: DataConfig, field: str) -> SampleIndex:
    """Without the samples on pictures of the sets that `c.exclude` names; what was left out stands in `notes`."""
    for name in c.exclude:
        held_out = set(_open(_named(name, c), f"{field}.exclude_root").image_keys)
        kept = [i for i, key in enumerate(samples.image_keys) if key not in held_out]
        if not kept:
            raise DataError(f"{field}.exclude: nothing of {samples.name} is left without the pictures of {name}")
        note = f"{len(samples) - len(kept)} of {len(samples)} samples are on pictures of {name} and were left out"
        samples = samples.keep(kept, note)
    return samples.keep(range(c.limit)) if 0 < c.limit < len(samples) else samples


def _named(name: str, c: DataConfig) -> DataConfig:
    """dataset/split or dataset/split_by/split."""
    words = name.split("/")
    split_by = words[1] if len(words) == 3 else c.split_by
    layout = "refer" if words[0] == "grefcoco" else c.layout
    root = c.exclude_root or c.root
    return DataConfig(root=root, dataset=words[0], layout=layout, split_by=split_by, split=words[-1])
