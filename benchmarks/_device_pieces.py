"""The rows of benchmarks/device.py: what each asks of either side, at real size and as a toy for a CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks._policy_step import published, raw_config

TOY = "toy"  # a size beside the published ones


@dataclasses.dataclass(frozen=True)
class Piece:
    """A row of the table. `kind` names the function of _device_ours.py and _device_torch.py that runs it."""

    name: str
    title: str
    kind: str
    size: str = "7b"  # of the policy
    rows: int = 4  # sequences of a step, or lanes
    tokens: int = 2048  # of each
    grid: tuple[int, int] = (64, 64)  # patches of the picture of each
    lora: int = 0  # rank; 0 = all parameters are trained
    slots: int = 64  # that decode together
    live: int = 1000  # tokens in the cache of each
    piece: int = 256  # tokens of a prompt that the engine reads at once
    weights_dtype: str = ""  # of the engine (sampling.weights_dtype)
    part: str = ""  # of benchmarks/bridge.py
    attention: str = "auto"  # of ours, on a GPU; with another the row has our side alone

    def toy(self) -> Piece:
        """The same work, small."""
        small = dict(tokens=96, grid=(8, 8) if self.grid < (32, 32) else (16, 16), piece=24)
        return dataclasses.replace(self, size=TOY, rows=2, slots=4, live=self.live // 10, lora=self.lora // 4, **small)

    @property
    def raw(self) -> dict[str, Any]:
        """config.json of the policy."""
        return raw_config(toy=True) if self.size == TOY else published(self.size)


ALL = "all parameters, full remat, 4 x 2,048 tokens"
PIECES = {
    p.name: p
    for p in (
        Piece("limits", "product of 8,192 x 8,192; a copy", "limits"),
        Piece("train-3b", f"SFT step, 3B, {ALL}, a 4,096-patch picture each", "train", size="3b"),
        Piece("decode-7b-1k", "decode, 7B bf16, 64 slots, 1,000 live tokens", "decode"),
        Piece("decode-7b-4k", "decode, 3,900 live", "decode", live=3900),
        Piece("decode-7b-int8", "decode, int8 weights, 1,000 live", "decode", weights_dtype="int8"),
        Piece("train-7b-lora", "SFT step, 7B, LoRA of rank 16, the same work", "train", lora=16),
        Piece("prefill-7b", "prefill, 7B, 8 prompts of 1,024 tokens", "prefill", rows=8, tokens=1024),
        Piece("tower", "vision tower of the 7B, 8 pictures of 4,096 patches", "tower", rows=8),
        Piece("sam-prompt", "SAM 2.1 large, prompt on a cached picture", "sam", part="overhead"),
        Piece("sam-throughput", "SAM 2.1 large, 64 trajectories, 16 pictures", "sam", part="throughput"),
        Piece("train-3b-text", f"SFT step, 3B, {ALL}, 64 patches each", "train", size="3b", grid=(8, 8)),
        Piece("train-3b-cudnn_causal", "train-3b by cuDNN told of causality", "train", "3b", attention="cudnn_causal"),
        Piece("train-3b-triton", "train-3b by the Triton kernel", "train", "3b", attention="triton"),
        Piece("parity", "log-probs that have to agree", "parity"),
    )
}
