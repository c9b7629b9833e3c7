"""The fields of configs/tiny_base.py: how the tiny base of the quickstart is made (rsagent_jax/tiny/pretrain.py)."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    steps: int  # updates
    rows: int  # of a batch
    lr: float  # learning rate at its highest
    warmup: int  # updates in which the rate rises
    final_lr: float = 0.05  # share of `lr` at the end
    tokens: int  # per row
    list_share: float = 0.0  # of the rows that are one list of names and places


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    seed: int = 0  # of weights and scenes
    init: str = ""  # a Hugging Face directory to go on from; "" = random weights
    see: StageConfig = StageConfig(steps=1200, rows=64, lr=3e-3, warmup=50, tokens=64)
    ground: StageConfig = StageConfig(steps=1800, rows=24, lr=1.5e-3, warmup=100, tokens=208, list_share=0.5)
    vocab_size: int = 1024  # of the tokenizer that is built
    hidden: int = 128  # width of the decoder
    layers: int = 4  # of the decoder
    heads: int = 4  # of its attention
    kv_heads: int = 2  # of its keys and values
    mlp: int = 384  # width of its MLP
    vision_hidden: int = 128  # width of the vision tower
    vision_layers: int = 4  # of the vision tower
    vision_mlp: int = 256  # width of its MLP
    absent_share: float = 0.0  # of the questions (lists and all objects apart) are about nothing in the scene
    presence_share: float = 0.0  # of the rows that are a list of names, each with the word that tells if it is there
    several_share: float = 0.0  # of the questions and lists that could be about all objects of a kind, are
    marked_share: float = 0.0  # of the rows that are about a mask drawn over some of the objects
    relation_share: float = 0.4  # of the questions about objects that have such a sentence
    all_share: float = 0.25  # of the scenes whose first question is for all objects
    look_weight: float = 1.0  # of the two attention losses, at coordinates and at words
    name_weight: float = 0.5  # of the loss on words in merged tokens
    corner_weight: float = 0.5  # of the loss on coordinates in merged tokens
    look_layer: int = 2  # the decoder layer whose first head is told where to look
    sigma: float = 1.2  # width of the bell over numbers, pixels
    aux_weight: float = 0.25  # of the losses of `see` in `ground`
    weight_decay: float = 0.01  # of AdamW
    eval_every: int = 150  # steps of `ground`
    eval_scenes: int = 256  # unseen scenes of an evaluation
    workers: int = 1  # processes that draw scenes
