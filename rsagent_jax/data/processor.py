"""Text and pictures -> ids, positions and patches, exactly as Hugging Face's Qwen2.5-VL processor makes them.

Text is encoded once, piece by piece, and never decoded and encoded again: training uses the ids that were sampled.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Self

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from rsagent_jax.agent.views import PixelLimits, round_size
from rsagent_jax.config.schema import SamplingConfig
from rsagent_jax.data.chat_template import check_chat_template
from rsagent_jax.data.image_config import ImageConfig
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig, hugging_face, load_config, read_json, token_ids
from rsagent_jax.models.qwen25_vl.positions import Grid, merged_tokens, mrope_positions
from rsagent_jax.types import DataError, Prompt
from sam_bridge.file_kinds import kind_of_file

IMAGE_PAD = "<|image_pad|>"
TERMINATOR = "<|im_end|>"


class Processor:
    """Tokenizer, image settings and special ids of one weights directory. Thread-safe.

    `terminator_id` ends a turn as the chat template writes it; `end_ids` are all tokens with which the model ends one:
    the terminator, and what generation_config.json (else config.json) has as eos_token_id.
    """

    def __init__(
        self, tokenizer: Tokenizer, images: ImageConfig, config: Qwen25VLConfig, eos_ids: Sequence[int] | None = None
    ):
        self.tokenizer, self.images, self.config = tokenizer, images, config
        self.image_id = self._special(IMAGE_PAD)
        self.terminator_id = self._special(TERMINATOR)
        self.end_ids = frozenset({self.terminator_id, *(config.eos_token_ids if eos_ids is None else eos_ids)})
        if self.image_id != config.image_token_id:
            raise DataError(
                f"the tokenizer's {IMAGE_PAD} is id {self.image_id}, config.json says {config.image_token_id}:"
                " the two files are of different models"
            )

    @classmethod
    def load(cls, directory: str | pathlib.Path) -> Self:
        """DataError for files that are missing, broken or of different models, and for another chat template."""
        path, config = pathlib.Path(directory) / "tokenizer.json", load_config(directory)
        if kind := kind_of_file(path):
            raise DataError(f"{path} is {kind}")
        try:
            tokenizer = hugging_face("AutoTokenizer").from_pretrained(directory, local_files_only=True)
        except Exception as error:  # the library raises bare Exception for a broken file
            raise DataError(f"{path} cannot be read as a tokenizer: {error}") from error
        images = ImageConfig.load(directory, config.vision)
        processor = cls(tokenizer.backend_tokenizer, images, config, _generation_eos(directory))
        check_chat_template(pathlib.Path(directory), tokenizer)
        return processor

    def with_ends(self, sampling: SamplingConfig) -> SamplingConfig:
        """The same sampling, which also stops at the model's own `end_ids`."""
        return dataclasses.replace(sampling, stop_ids=tuple(sorted(self.end_ids.union(sampling.stop_ids))))

    def encode(self, text: str) -> np.ndarray:
        """i32[T]; special tokens in the text count as such, nothing is added."""
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        return self.tokenizer.decode([int(t) for t in tokens], skip_special_tokens=False)

    def prompt(
        self, text: str, images: Sequence[np.ndarray], start: int = 0, limits: PixelLimits | None = None
    ) -> tuple[Prompt, int]:
        """Sample or observation -> prompt: one IMAGE_PAD in `text` per image u8[h, w, 3]; positions go on from `start`.

        limits: those of the trajectory that shows the images, see `image_patches`. Returns the prompt and the position
        of the next token.
        """
        ids = self.encode(text)
        patched = [image_patches(image, self.images, limits) for image in images]
        grids = tuple(grid for _, grid in patched)
        if int((ids == self.image_id).sum()) != len(images):
            raise ValueError(f"{int((ids == self.image_id).sum())} image placeholders for {len(images)} images")
        counts = np.ones(len(ids), np.int64)
        counts[ids == self.image_id] = [merged_tokens(grid, self.images.merge_size) for grid in grids]
        ids = np.repeat(ids, counts)
        positions, end = mrope_positions(ids, grids, self.image_id, start, self.images.merge_size)
        patches = np.concatenate([p for p, _ in patched]) if patched else self.no_patches()
        return Prompt(ids, positions, patches, grids), end

    def square(self, side: int) -> Grid:
        """The grid of a square picture of `side` pixels: the largest that fits into it."""
        h, w = round_size(side, side, self.images.limits)
        return (1, h // self.images.patch_size, w // self.images.patch_size)

    def no_patches(self) -> np.ndarray:
        return np.zeros((0, self.config.vision.patch_dim), np.float32)

    def _special(self, token: str) -> int:
        index = self.tokenizer.token_to_id(token)
        if index is None:
            raise DataError(f"the tokenizer has no {token}: this is not a Qwen2.5-VL tokenizer")
        return index


def _generation_eos(directory: str | pathlib.Path) -> tuple[int, ...] | None:
    """eos_token_id of generation_config.json: Qwen2.5-VL has [<|im_end|>, <|endoftext|>]. None where it names none."""
    path = pathlib.Path(directory) / "generation_config.json"
    value = read_json(path).get("eos_token_id") if path.exists() else None
    if value is not None and not token_ids(value):
        raise DataError(f"{path}: eos_token_id = {value!r} is neither a token id nor a list of them")
    return None if value is None else token_ids(value)


def image_patches(image: np.ndarray, config: ImageConfig, limits: PixelLimits | None = None) -> tuple[np.ndarray, Grid]:
    """u8[h, w, 3] -> (f32[P, C*2*14*14], grid): smart resize (bicubic), rescale, normalise, merge-block order.

    A picture that already has its smart-resized size is not resampled. limits: of the trajectory that shows it
    (EnvState.limits); their minimum may be below the processor's own (views.fit), and such a view keeps its size, too.
    """
    h, w = round_size(*image.shape[:2], config.limits.lowered_to(limits or config.limits))
    if (h, w) != image.shape[:2]:
        image = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC))
    mean, std = (np.asarray(v, np.float32) for v in (config.mean, config.std))
    patch, merge = config.patch_size, config.merge_size
    grid = (1, h // patch, w // patch)
    x = image.reshape(grid[1] // merge, merge, patch, grid[2] // merge, merge, patch, 3)
    x = x.transpose(6, 0, 3, 1, 4, 2, 5)  # channel, merge row, merge column, row, column, y, x
    # A channel has 256 levels: normalised once each and looked up, which is three times as fast as per pixel.
    levels = (np.arange(256, dtype=np.float32)[:, None] * np.float32(1 / 255) - mean) / std
    patches = np.empty((grid[1] * grid[2], 3, config.temporal_patch_size, patch * patch), np.float32)
    for channel in range(3):
        patches[:, channel] = levels[:, channel][x[channel]].reshape(len(patches), 1, -1)
    return patches.reshape(len(patches), -1), grid


def unpatchify(
    patches: np.ndarray, segment_ids: np.ndarray, positions: np.ndarray, config: ImageConfig
) -> list[np.ndarray]:
    """The images of one row's patch buffer as the policy sees them: list of u8[h, w, 3]. Undoes `image_patches`."""
    out = []
    for number in range(1, int(segment_ids.max(initial=0)) + 1):
        here = segment_ids == number
        x = patches[here].reshape(-1, 3, config.temporal_patch_size, config.patch_size, config.patch_size)[:, :, 0]
        x = x * np.asarray(config.std, np.float32)[:, None, None] + np.asarray(config.mean, np.float32)[:, None, None]
        (rows, cols), (h, w) = positions[here].T, positions[here].max(0) + 1
        grid = np.zeros((h, w, *x.shape[1:]), np.float32)
        grid[rows, cols] = x
        image = grid.transpose(0, 3, 1, 4, 2).reshape(h * config.patch_size, w * config.patch_size, 3)
        out.append(np.clip(np.round(image * 255), 0, 255).astype(np.uint8))
    return out
