"""Model FLOPs: the arithmetic that a step of a Qwen2.5-VL needs, counted from its shape and not from a program.

Conventions, so that shares of the peak compare with published ones:
  - a multiply-add is 2 FLOPs; norms, softmax, rotary angles, activations and the optimizer are left out;
  - causal attention is halved: a segment of s tokens has s * s / 2 pairs (older tables often do not halve);
  - a part that is trained costs twice its forward pass again: gradients of its input and of its weights. A frozen part
    has no weight gradients; where nothing before it is trained it has no input gradients either. Pixels have none,
    so the patch embedding's backward pass costs its forward pass once;
  - nothing is added for rematerialisation, nor for padding beyond what the Workload states;
  - the vision tower attends inside windows of 112 x 112 pixels, cut off at an image's edge, or inside a whole image.
"""

import dataclasses

from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig


@dataclasses.dataclass(frozen=True)
class Workload:
    """What one step sees. All rows are alike; rows count over the whole mesh."""

    rows: int
    tokens: int  # per row, through every matrix product of the decoder; without padding: sum(segments)
    segments: tuple[int, ...]  # tokens of each packed sequence of a row: attention stays inside them
    images: tuple[tuple[int, int], ...] = ()  # (rows, columns) in patches of each image of a row
    trained: bool = True  # the decoder and its head
    vision_trained: bool = True
    embed_trained: bool = False  # what the decoder reads, its embeddings or the merger's output; told if it is frozen
    adapters: int = 0  # parameters of LoRA's adapters in the decoder's layers; they are trained


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one step over the whole mesh, forward and backward."""

    decoder_matmuls: float
    decoder_attention: float
    head: float
    adapters: float
    patch_embedding: float
    vision_matmuls: float
    vision_window_attention: float
    vision_full_attention: float
    merger: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))


def model_flops(config: Qwen25VLConfig, work: Workload) -> Flops:
    """FLOPs of one step under the conventions above."""
    text, vision = config.text, config.vision
    # Gradients reach a part's input when something before it is trained: the embeddings with the decoder, the tower, or
    # adapters (those of the first layer, strictly, are reached by fewer).
    through = work.trained or work.vision_trained or work.embed_trained or work.adapters > 0
    decoder = 1 + work.trained + through
    tower = 1 + 2 * work.vision_trained
    attention = 1 + 2 * through  # no weights of its own: both products of its backward pass are input gradients

    d, ff, h = text.hidden_size, text.intermediate_size, text.head_dim
    heads, kv = text.num_attention_heads * h, text.num_key_value_heads * h
    layer = d * heads + 2 * d * kv + heads * d + 3 * d * ff  # q, k and v, o, then gate, up and down
    tokens = work.rows * work.tokens
    pairs = work.rows * sum(s * s / 2 for s in work.segments)

    patches = work.rows * sum(rows * columns for rows, columns in work.images)
    window_pairs = work.rows * sum(
        n * n for grid in work.images for n in _windows(grid, vision.window_side * vision.spatial_merge_size)
    )
    image_pairs = work.rows * sum((rows * columns) ** 2 for rows, columns in work.images)
    full = sum(0 <= i < vision.depth for i in set(vision.fullatt_block_indexes))
    e, unit = vision.hidden_size, vision.merge_unit
    block = 4 * e * e + 3 * e * vision.intermediate_size  # q, k, v and proj, then gate, up and down
    merged = (unit * e) ** 2 + unit * e * vision.out_hidden_size

    return Flops(
        decoder_matmuls=2.0 * tokens * layer * text.num_hidden_layers * decoder,
        decoder_attention=4.0 * pairs * heads * text.num_hidden_layers * attention,  # scores, then values
        head=2.0 * tokens * d * text.vocab_size * decoder,
        adapters=2.0 * tokens * work.adapters * 3,
        patch_embedding=2.0 * patches * vision.patch_dim * e * (1 + work.vision_trained),
        vision_matmuls=2.0 * patches * block * vision.depth * tower,
        vision_window_attention=4.0 * window_pairs * e * (vision.depth - full) * tower,
        vision_full_attention=4.0 * image_pairs * e * full * tower,
        merger=2.0 * patches / unit * merged * tower,
    )


def _windows(grid: tuple[int, int], side: int) -> list[int]:
    """Patches in each attention window of an image of `grid` patches; `side` is a full window's."""
    sides = [[min(side, length - start) for start in range(0, length, side)] for length in grid]
    return [rows * columns for rows in sides[0] for columns in sides[1]]
