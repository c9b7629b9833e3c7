"""Back ends: how an image is encoded once and how a prompt on it becomes a mask. Found by name through `load`."""

import dataclasses
import importlib
import importlib.util
import pathlib
import sys
from types import ModuleType
from typing import Any, Protocol, Self

import numpy as np

from sam_bridge import hub
from sam_bridge.types import SegmentRequest

NAMES = ("grabcut", "sam2")
SAM2_MODELS = tuple(
    f"{family}_{size}" for family in ("sam2.1", "sam2") for size in "tiny small base_plus large".split()
)
RANDOM = "random"  # the checkpoint that is none: random weights, the same in every process, for tests


DTYPES = ("float32", "bfloat16")
MULTIMASK = ("point", "never", "always")


def is_random(identity: str) -> bool:
    """Whether a back end of this identity has random weights: they are a word of it, not letters of a name."""
    return RANDOM in identity.split()


class BackendError(ValueError):
    """The back end named on the command line cannot be had. The message says what to do."""


class DeadDevice(Exception):
    """The device answers nothing any more until the process is started anew."""


def _option(default: str | int, help: str) -> Any:
    """A field of Options; `help` is its line of --help."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Options:
    """What `python -m sam_bridge` passes on to a back end. All of it is for sam2."""

    checkpoint: str = _option("", "Meta's .pt file, a hub's name for it (facebook/sam2.1-hiera-large), or random")
    model: str = _option("", f"{', '.join(SAM2_MODELS)}; without it as the checkpoint's file name says")
    device: str = _option("cpu", "cpu, cuda, cuda:1; several with commas (cuda:0,cuda:1): one model and worker each")
    dtype: str = _option("float32", "or bfloat16: matrix products in bf16, as under torch.autocast")
    multimask: str = _option(
        "point", "best of three masks by SAM's own score for a single click (point), never, always"
    )
    threads: int = _option(0, "torch's threads on a CPU, shared by several cpu workers; 0 = all cores it may use")
    encode_batch: int = _option(0, "largest batch of pictures; 0 = 1 on a CPU, 8 on a GPU; 1 = the predictor's bits")
    decode_batch: int = _option(0, "largest batch of prompts; 0 = 1 on a CPU, 32 on a GPU; 1 = the predictor's bits")


@dataclasses.dataclass(frozen=True)
class PackedMask:
    """bool[height, width] as bits: an eighth of what a device has to hand over."""

    bits: np.ndarray  # u8[ceil(height * width / 8)], row-major, the first pixel in the highest bit, 0 after the last
    height: int
    width: int

    @classmethod
    def of(cls, mask: np.ndarray) -> Self:
        return cls(np.packbits(mask), *mask.shape)

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.width

    def unpack(self) -> np.ndarray:
        bits = np.unpackbits(self.bits, count=self.height * self.width)
        return bits.view(bool).reshape(self.height, self.width)


Mask = np.ndarray | PackedMask  # bool[h, w], or its bits


def as_pixels(mask: Mask) -> np.ndarray:
    """bool[h, w]"""
    return mask.unpack() if isinstance(mask, PackedMask) else mask


@dataclasses.dataclass(frozen=True)
class Decoded:
    """`logits` is whatever the back end wants back when this mask is refined; its `nbytes` count in the cache."""

    mask: Mask
    score: float  # 0..1
    logits: Any
    candidates: tuple[Mask, ...] = ()  # where the request wants them and there are several


class Backend(Protocol):
    """Thread-safe, stateless between calls (LocalSegmenter keeps encodings and logits). Inputs are already checked.

    May also have: `identity`, a string that is equal for back ends that give equal masks (else its name);
    `concurrency`, how many calls it wants at a time (else 2); `counters() -> dict[str, float]`; `close()`.
    """

    name: str

    def encode(self, image: np.ndarray) -> tuple[Any, int]:
        """u8[h, w, 3] -> (encoding, its bytes)."""
        ...

    def decode(self, encoding: Any, request: SegmentRequest, logits: Any | None) -> Decoded:
        """`logits`: of the mask that `request.refine` names, else None. Same arguments, same mask."""
        ...


DEFAULTS = Options()


def local_checkpoint(name: str) -> str:
    """The file that `--checkpoint` names: itself, "random", or the one .pt file of a hub's `org/name[@revision]`."""
    if name == RANDOM or pathlib.Path(name).is_file():
        return name
    if not hub.is_repository(name):
        raise BackendError(f"{name} does not exist; give sam2's .pt file, or facebook/sam2.1-hiera-large and its like")
    try:
        found = sorted(hub.download(name, ["*.pt"]).glob("*.pt"))
    except hub.HubError as error:
        raise BackendError(str(error)) from error
    if len(found) != 1:
        raise BackendError(f"{name} holds {len(found)} .pt files, not one; download the one you mean and give its path")
    return str(found[0])


def load_backend(name: str, options: Options = DEFAULTS) -> Backend:
    """A built-in name, or `module:factory` or `file.py:factory` for one of your own, which takes no arguments."""
    if name == "sam2":
        if not options.checkpoint:  # before torch is imported
            raise BackendError(f"sam2 needs --checkpoint=FILE.pt, or --checkpoint={RANDOM} for a test")
        try:
            from sam_bridge.backends.sam2 import Sam2
        except ImportError as error:
            raise BackendError(f"the sam2 back end needs torch and sam2, see docs/sidecar.md: {error}") from error
        return Sam2(dataclasses.replace(options, checkpoint=local_checkpoint(options.checkpoint)))
    changed = [f.name for f in dataclasses.fields(options) if getattr(options, f.name) != f.default]
    if changed:
        raise BackendError(f"{', '.join(changed)}: only the sam2 back end has such an option, not {name!r}")
    if name == "grabcut":
        from sam_bridge.backends.grabcut import GrabCut

        return GrabCut()
    module, colon, attribute = name.rpartition(":")
    if not colon:
        raise BackendError(f"unknown back end {name!r}; options: {', '.join(NAMES)}, or module:factory")
    try:
        return getattr(_import(module), attribute)()
    except (ImportError, AttributeError, OSError) as error:
        raise BackendError(f"back end {name!r} cannot be imported: {error}") from error


def _import(module: str) -> ModuleType:
    """By its name or, with `.py` at the end, its path; what such a file imports may stand beside it."""
    if not module.endswith(".py"):
        return importlib.import_module(module)
    file = pathlib.Path(module).expanduser().resolve()
    sys.path.append(str(file.parent))
    spec = importlib.util.spec_from_file_location(f"back_end_{file.stem}", file)
    loaded = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
