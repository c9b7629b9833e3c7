"""The fields of configs/tiny_base.py: how the tiny base of the quickstart is made (rsagent_jax/tiny/pretrain.py)."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    steps: int  # updates
    rows: int  # of a batch
    lr: float  # learning rate at its highest
    warmup: int = 200  # updates in which the rate rises
    final_lr: float = 0.05  # share of `lr` at the end
    tokens: int = 288  # per row
    list_share: float = 0.0  # of the rows that are one list of names and places


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    seed: int  # of weights and scenes
    init: str  # a Hugging Face directory to go on from; "" = random weights
    see: StageConfig
    ground: StageConfig
    vocab_size: int  # of the tokenizer that is built
    hidden: int  # width of the decoder
    layers: int  # of the decoder
    heads: int  # of its attention
    kv_heads: int  # of its keys and values
    mlp: int  # width of its MLP
    vision_hidden: int  # width of the vision tower
    vision_layers: int  # of the vision tower
    vision_mlp: int  # width of its MLP
    absent_share: float  # of the questions (lists and all objects apart) are about nothing in the scene
    presence_share: float  # of the rows that are one list of names, each with the word that says whether it is there
    several_share: float  # of the questions and lists that could be about all objects of a kind, are
    marked_share: float  # of the rows that are about a mask drawn over some of the objects
    relation_share: float  # of the questions about objects that have such a sentence
    all_share: float  # of the scenes whose first question is for all objects
    look_weight: float  # of the two attention losses, at coordinates and at words
    name_weight: float  # of the loss on words in merged tokens
    corner_weight: float  # of the loss on coordinates in merged tokens
    look_layer: int  # the decoder layer whose first head is told where to look
    sigma: float  # width of the bell over numbers, pixels
    aux_weight: float  # of the losses of `see` in `ground`
    weight_decay: float  # of AdamW
    eval_every: int  # steps of `ground`
    eval_scenes: int  # unseen scenes of an evaluation
    workers: int  # processes that draw scenes
