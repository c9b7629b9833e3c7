"""Makes the tiny base: a few-megabyte Qwen2.5-VL that grounds sentences in scenes, in the Hugging Face format.

  python -m rsagent_jax.tiny.pretrain --config=configs/tiny_base.py --workdir=runs/tiny_base --out=assets/tiny-base

Two stages on fresh scenes. `see`: the vision tower alone. Each merged token tells what stands on its patches (colour,
shape, size, box) through a head that is thrown away, spells its object's box and point in the decoder's own numbers,
and says its colour, shape and size in the decoder's own words. `ground`: the whole policy on Qwen2.5-VL's grounding
questions (all objects; one by box; one by point), on the same in free words, and on lists of names and places, with
the losses of `see` as auxiliary ones and one attention head told where to look: at a coordinate its object, at a
colour, shape or size all that has it. With `presence_share` also on lists of names, each followed by the word that
tells whether such a thing is there (configs/tiny_base.py:absent); with `several_share` on all of a kind, and with
`marked_share` on masks drawn over a scene (:several). It never sees a tool call. Coordinates are trained
towards a narrow bell over neighbouring numbers, so that near misses are told from far ones. With --config.init=DIR and
no steps it only evaluates.
"""

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import collections
import functools
import json
import pathlib
import time
from collections.abc import Callable, Sequence

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tokenizers import Tokenizer

from rsagent_jax.agent import prompts
from rsagent_jax.config.pretrain import PretrainConfig, StageConfig
from rsagent_jax.data.pipeline import prefetched
from rsagent_jax.data.processor import Processor
from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.models.qwen25_vl.attention import attention
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig, read_json
from rsagent_jax.models.qwen25_vl.language import mrope_angles
from rsagent_jax.models.qwen25_vl.layers import Linear, layer_at
from rsagent_jax.models.qwen25_vl.load import local_weights
from rsagent_jax.models.qwen25_vl.model import Qwen25VL
from rsagent_jax.runtime.local_copies import local_directory
from rsagent_jax.runtime.paths import AppendFile, make_directory, open_path
from rsagent_jax.tiny import absent, grounding, scenes, vocab
from rsagent_jax.tiny.grounding import COLORS, MAX_OBJECTS, SHAPES, SIDE, SIZES, GroundingRows, SceneRows
from rsagent_jax.types import DataError


def hf_config(c: PretrainConfig, ids: dict[str, int]) -> dict:
    """config.json as Qwen2.5-VL has it on the hub: that of the shipped base, in the sizes of `c`."""
    raw, half = read_json(vocab.BASE / "config.json"), c.hidden // c.heads // 2
    section = [half // 4, (half - half // 4) // 2, half - half // 4 - (half - half // 4) // 2]
    special = {"bos": "endoftext", "eos": "im_end", "image": "image_pad", "video": "video_pad"}
    special |= {name: name for name in ("vision_start", "vision_end")}
    vision = {
        "depth": c.vision_layers,
        "hidden_size": c.vision_hidden,
        "intermediate_size": c.vision_mlp,
        "num_heads": c.heads,
        "out_hidden_size": c.hidden,
        "fullatt_block_indexes": [c.vision_layers - 1],
    }
    return raw | {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden,
        "intermediate_size": c.mlp,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "rope_scaling": {"type": "mrope", "mrope_section": section},
        **{f"{name}_token_id": ids[f"<|{token}|>"] for name, token in special.items()},
        "vision_config": raw["vision_config"] | vision,
    }


class Head(nnx.Module):
    """From a merged token to what stands on its four patches; used in pre-training only."""

    OUT = (len(COLORS) + 1, len(SHAPES) + 1, len(SIZES) + 1, 4)

    def __init__(self, dim: int, rngs: nnx.Rngs):
        self.linear = Linear(dim, 4 * sum(self.OUT), ("embed", None), rngs, bias=True)
        self.corners = Linear(dim, 6 * dim, ("embed", None), rngs, bias=False)

    def loss(self, merged_BMD, labels_BP3, boxes_BP4):
        """Cross-entropy of colour, shape and size (0 = nothing) plus the L1 of the box, patches in buffer order."""
        b, m, _ = merged_BMD.shape
        out = jnp.split(self.linear(merged_BMD).reshape(b, m * 4, -1), np.cumsum(self.OUT)[:-1].tolist(), axis=-1)
        ce = sum(
            optax.softmax_cross_entropy_with_integer_labels(logits, labels_BP3[..., i]).mean()
            for i, logits in enumerate(out[:3])
        )
        on = labels_BP3[..., 0] > 0
        l1 = jnp.abs(out[3] - boxes_BP4).sum(-1)
        return ce + 2.0 * jnp.sum(l1 * on) / jnp.maximum(on.sum(), 1)


def number_targets(ids: np.ndarray, vocab: int, sigma: float) -> np.ndarray:
    """f32[V, V]: row v is the target distribution for token v: itself, or a bell where v is one of `ids`, those of the
    numbers 0 … SIDE."""
    table = np.eye(vocab, dtype=np.float32)
    bell = np.exp(-0.5 * ((np.arange(SIDE + 1)[:, None] - np.arange(SIDE + 1)[None]) / sigma) ** 2)
    table[np.ix_(ids, ids)] = bell / bell.sum(1, keepdims=True)
    return table


def ground_loss(
    model: Qwen25VL, head: Head, rows: GroundingRows, targets_VV, config: PretrainConfig, numbers, words, image_at: int
):
    """Cross-entropy of the answers, plus `see_loss`, plus how far the look is from the object asked for."""
    hidden, merged, look = _hidden(model, rows, config.look_layer, image_at)
    logits = model.logits(hidden[:, :-1])
    logp = jax.nn.log_softmax(logits, axis=-1)
    mask = rows.loss_mask[:, 1:]
    ce = -jnp.sum(targets_VV[rows.tokens[:, 1:]] * logp, axis=-1)
    lm = jnp.sum(ce * mask) / jnp.maximum(mask.sum(), 1)
    cells = jnp.take_along_axis(rows.cells, jnp.maximum(rows.target[:, 1:] - 1, 0)[..., None], axis=1)
    off = -jnp.sum(cells * look[:, :-1], axis=-1)
    at = rows.target[:, 1:]
    looked, said = (
        jnp.sum(off * on) / jnp.maximum(on.sum(), 1) for on in ((at > 0) & (at <= MAX_OBJECTS), at > MAX_OBJECTS)
    )
    seen, metrics = see_loss(model, head, rows, targets_VV, config, numbers, words, merged)
    return lm + config.look_weight * (looked + said) + seen, metrics | {"lm": lm, "look": looked, "words": said}


def _hidden(model: Qwen25VL, rows: GroundingRows, look_layer: int = -1, image_at: int = 0):
    """Hidden states [B, T, D], the merged image tokens [B, M, D] that the head reads, and the look.

    The look is log-softmax over the image's M tokens of one layer's first head, [B, T, M]: where each position looks.
    """
    merged = model.vision(rows.patches, rows.patch_segment_ids, rows.patch_positions)
    x, decoder = model.place(rows.tokens, merged, rows.image_slots), model.decoder
    cos, sin = mrope_angles(rows.positions, decoder.config)
    t, m = rows.tokens.shape[1], merged.shape[1]
    mask = (rows.segment_ids[:, :, None] == rows.segment_ids[:, None, :]) & jnp.tril(jnp.ones((t, t), bool))
    look = []
    for i in range(decoder.config.num_hidden_layers):

        def attend(q_BTNH, k_BKTH, v_BKTH, i=i):
            if i == look_layer:
                scores = jnp.einsum("BTH,BMH->BTM", q_BTNH[:, :, 0], k_BKTH[:, 0, image_at : image_at + m])
                look.append(jax.nn.log_softmax(scores * q_BTNH.shape[-1] ** -0.5, axis=-1))
            return attention(q_BTNH, k_BKTH, v_BKTH, mask)

        x = layer_at(decoder.layers, i)(x, cos, sin, attend)
    return decoder.norm(x), merged, look[0] if look else None


def see_loss(
    model: Qwen25VL, head: Head, rows: GroundingRows, targets_VV, config: PretrainConfig, numbers, words, merged=None
):
    """The head's loss and those of coordinates and words in the merged image tokens [B, M, D]; None = not made yet."""
    if merged is None:
        merged = model.vision(rows.patches, rows.patch_segment_ids, rows.patch_positions)
    aux = head.loss(merged, rows.labels, rows.boxes)
    corners = corner_loss(model, head, merged, rows, targets_VV, numbers)
    names = name_loss(model, merged, rows, words)
    loss = config.aux_weight * aux + config.corner_weight * corners + config.name_weight * names
    return loss, {"aux": aux, "corners": corners, "names": names}


def corner_loss(model: Qwen25VL, head: Head, merged_BMD, rows: GroundingRows, targets_VV, numbers) -> jax.Array:
    """Each merged token says its object's box and point in the decoder's own numbers, by a linear map per coordinate.

    So the tower puts coordinates where one attention of the decoder can pick them up with just such a map.
    """
    b, m, d = merged_BMD.shape
    said = model.decoder.norm(head.corners(merged_BMD).reshape(b, m, 6, d))
    logp = jax.nn.log_softmax(said @ model.decoder.head_VD[numbers].T, axis=-1)
    wanted = targets_VV[numbers[jnp.maximum(rows.corners, 0)]][..., numbers]
    on = rows.corners[..., 0] >= 0
    return -jnp.sum(jnp.sum(wanted * logp, axis=-1).mean(-1) * on) / jnp.maximum(on.sum(), 1)


def name_loss(model: Qwen25VL, merged_BMD, rows: GroundingRows, words) -> jax.Array:
    """Each merged token says its object's colour, shape and size as it stands, in the decoder's own words.

    Without it these are a few per cent of a token's variance, which is mostly coordinates, and no attention learns to
    match names by them.
    """
    logits = model.decoder.norm(merged_BMD) @ model.decoder.head_VD[words].T
    groups, at, loss = (len(COLORS), len(SHAPES), len(SIZES)), 0, 0.0
    on = rows.names[..., 0] >= 0
    for k, n in enumerate(groups):
        label = jnp.maximum(rows.names[..., k] - at, 0)
        ce = optax.softmax_cross_entropy_with_integer_labels(logits[..., at : at + n], label)
        loss, at = loss + jnp.sum(ce * on) / jnp.maximum(on.sum(), 1), at + n
    return loss


def make_step(loss: Callable, tx, graphdef, *tables):
    def step(params, opt_state, rows):
        def loss_fn(p):
            return loss(*nnx.merge(graphdef, p), rows, *tables)

        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, metrics

    return jax.jit(step, donate_argnums=(0, 1))


def optimizer(stage: StageConfig, weight_decay: float) -> optax.GradientTransformation:
    if stage.steps <= stage.warmup:
        raise DataError(f"a stage of {stage.steps} steps has no room for {stage.warmup} of warm-up; lower warmup")
    schedule = optax.warmup_cosine_decay_schedule(0.0, stage.lr, stage.warmup, stage.steps, stage.lr * stage.final_lr)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=weight_decay))


def evaluate_grounding(model: Qwen25VL, maker: SceneRows, seed: int, count: int) -> dict[str, float]:
    """Greedy answers on unseen scenes: box IoU and clicks that hit, by kind of sentence, and what is said to be there.

    The answer's format is given; every coordinate is read with the policy's own earlier ones before it.
    """
    lookup = {int(maker.processor.encode(str(n))[0]): n for n in range(SIDE)}
    rng = np.random.default_rng((seed, 999))
    cases = [(maker.scene(rng), point) for point in (False, True) for _ in range(count)]
    said = [scene.expressions[rng.integers(len(scene.expressions))] for scene, _ in cases]
    rows = [
        maker.row(scene, [grounding.grounding_question(s.text, scene, s.object_index, point)], 128)
        for (scene, point), s in zip(cases, said, strict=True)
    ]
    at = [
        [t for t in np.flatnonzero(row.loss_mask) if int(row.tokens[t]) in lookup][-2 if point else -4 :]
        for row, (_, point) in zip(rows, cases, strict=True)
    ]
    forward = functools.partial(nnx.jit(lambda m, r: jnp.argmax(m.logits(_hidden(m, r)[0]), axis=-1)), model)
    results = collections.defaultdict(list)
    for ids, (scene, point), s in zip(read_answers(forward, rows, at), cases, said, strict=True):
        guess, thing = [lookup.get(id, 0) for id in ids], scene.objects[s.object_index]
        value = float(thing.mask[guess[1], guess[0]]) if point else _box_iou(guess, thing.box)
        results[f"{'click' if point else 'iou'}_{s.kind}"].append(value)
    seen = [scene for scene, point in cases if point]
    for more in (_presence, _several, _masks):
        results |= more(forward, maker, rng, seen)
    return {k: round(float(np.mean(v)), 4) for k, v in sorted(results.items())}


def _presence(forward, maker: SceneRows, rng: np.random.Generator, seen: Sequence[scenes.Scene]) -> dict[str, list]:
    """How often the word after "The red star is" says rightly whether it is there; each scene is asked both ways."""
    results, rows, asked = {"absent_told": [], "present_told": []}, [], []
    for scene in seen:
        text = absent.sample_absent(rng, scene, maker.scene_config)
        true = scenes.sample_expression(rng, scene, maker.scene_config).text
        for key, name in (("absent_told", text), ("present_told", true)):
            if name:
                ask, no = grounding.presence_question(name)
                rows.append(maker.row(scene, [ask], 128))
                asked.append((key, maker.processor.encode(no)[0]))
    ends = [np.flatnonzero(row.loss_mask)[-1:] for row in rows]  # the terminator that `row` puts after the answer
    for (id,), (key, no) in zip(read_answers(forward, rows, ends), asked, strict=True):
        results[key].append(float((id == no) == (key == "absent_told")))
    return results


def _several(forward, maker: SceneRows, rng: np.random.Generator, seen: Sequence[scenes.Scene]) -> dict[str, list]:
    """Of "every red star": how often the first point is on one, and how often each of the points is on another."""
    lookup = {int(maker.processor.encode(str(n))[0]): n for n in range(SIDE)}
    asked = [(scene, plurals) for scene in seen if (plurals := sorted(scenes.plurals_of(scene.objects).items()))]
    asked = [(scene, *plurals[rng.integers(len(plurals))]) for scene, plurals in asked]
    rows = [maker.row(s, [grounding.several_question(rng, text, members, s)], 160) for s, text, members in asked]
    at = [[t for t in np.flatnonzero(row.loss_mask) if 0 < row.target[t] <= MAX_OBJECTS] for row in rows]
    results = {"several_first": [], "several_all": []}
    for ids, (scene, _, members) in zip(read_answers(forward, rows, at), asked, strict=True):
        points = np.array([lookup.get(id, 0) for id in ids]).reshape(-1, 2)
        on = [[k for k in members if scene.objects[k].mask[y, x]] for x, y in points]
        results["several_first"].append(float(bool(on[0])))
        results["several_all"].append(float({k for hit in on for k in hit} == set(members)))
    return results


def _masks(forward, maker: SceneRows, rng: np.random.Generator, seen: Sequence[scenes.Scene]) -> dict[str, list]:
    """How often it is told rightly whether a mask that is drawn over the scene has all of a thing."""
    results, rows, asked = {"fits_told": [], "missing_told": []}, [], []
    for scene in seen:
        drawn, marked = grounding.mark(rng, scene)
        for line in list(maker.marks(rng, drawn, marked, True))[:2]:
            rows.append(maker.row(drawn, [grounding.Question("List them.", "", lines=(line,))], 128))
            asked.append(line.answer)
    at = [np.flatnonzero(row.loss_mask)[:1] for row in rows]
    wanted = [int(row.tokens[places[0]]) for row, places in zip(rows, at, strict=True)]
    for (id,), right, answer in zip(read_answers(forward, rows, at), wanted, asked, strict=True):
        results["missing_told" if "missing" in answer else "fits_told"].append(float(id == right))
    return results


def read_answers(
    forward: Callable[[GroundingRows], jax.Array], rows: Sequence[GroundingRows], at: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Of each row, without the axis B: what the policy says at the places `at`, each after its own words before.

    `forward` gives the token that the policy predicts after each place, of rows with the axis B.
    """
    answers = []
    for i in range(0, len(rows), 64):
        batch, places = jax.tree.map(lambda *a: np.stack(a), *rows[i : i + 64]), at[i : i + 64]
        for k in range(max(map(len, places))):
            said = np.asarray(forward(batch))
            for b, row_places in enumerate(places):
                if k < len(row_places):
                    batch.tokens[b, row_places[k]] = said[b, row_places[k] - 1]
        answers += [batch.tokens[b, row_places].tolist() for b, row_places in enumerate(places)]
    return answers


def _box_iou(a, b) -> float:
    inter = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area = [max(0.0, x[2] - x[0]) * max(0.0, x[3] - x[1]) for x in (a, b)]
    return inter / max(area[0] + area[1] - inter, 1e-9)


def pretrain(config: PretrainConfig, workdir: pathlib.Path, out: pathlib.Path) -> None:
    """out: on this machine."""
    make_directory(workdir)
    init = config.init and local_weights(config.init)
    if init:  # the weights' own: one built anew follows today's prompts
        tokenizer = Tokenizer.from_file(str(init / "tokenizer.json"))
    else:
        tokenizer = vocab.build_tokenizer(config.vocab_size)
    vocab.save_tokenizer(tokenizer, out, SIDE * SIDE, SIDE * SIDE)
    raw = hf_config(config, tokenizer.get_vocab())
    shape = Qwen25VLConfig.from_hf(raw)
    rngs = nnx.Rngs(config.seed)
    model, head = nnx.jit(lambda rngs: (Qwen25VL(shape, rngs), Head(config.hidden, rngs)))(rngs)
    if init:
        model = convert.load_model(init, shape)
    convert.save_model(model, out, raw)
    processor = Processor.load(out)
    maker = SceneRows(processor, config.relation_share, config.all_share)
    opening = processor.encode(prompts.opening(prompts.BASE_SYSTEM, ""))
    image_at = int(np.flatnonzero(opening == processor.image_id)[0])
    targets = jnp.asarray(number_targets(maker.numbers, config.vocab_size, config.sigma))
    log = AppendFile(workdir / "pretrain.jsonl")

    def write(record: dict) -> None:
        print(json.dumps(record), flush=True)
        log.add(json.dumps(record) + "\n")

    for number, (name, stage) in enumerate((("see", config.see), ("ground", config.ground))):
        if stage.steps == 0:
            continue
        graphdef, params = nnx.split((model, head))
        tx = optimizer(stage, config.weight_decay)
        opt_state, start = jax.jit(tx.init)(params), time.time()
        loss = see_loss if name == "see" else functools.partial(ground_loss, image_at=image_at)
        step_fn = make_step(loss, tx, graphdef, targets, config, jnp.asarray(maker.numbers), jnp.asarray(maker.words))
        shares = (config.relation_share, config.all_share, stage.list_share, config.absent_share)
        shares = (*shares, config.presence_share, config.several_share, config.marked_share)
        drawn = dict(seed=(config.seed, number), rows=stage.rows, tokens=stage.tokens, talk=name == "ground")
        made = grain.MapDataset.range(stage.steps).map(functools.partial(SceneRows(processor, *shares).make, **drawn))
        for step, rows in enumerate(prefetched(made, 1, config.workers, 2), start=1):
            params, opt_state, metrics = step_fn(params, opt_state, rows)
            if step % 50 == 0:
                record = {"stage": name, "step": step, "seconds": round(time.time() - start, 1)}
                record |= {k: round(float(v), 4) for k, v in metrics.items()}
                if name == "ground" and step % config.eval_every == 0 and step < stage.steps:
                    model, head = nnx.merge(graphdef, params)
                    record |= evaluate_grounding(model, maker, config.seed, config.eval_scenes)
                    convert.save_model(model, out, raw)
                write(record)
        model, head = nnx.merge(graphdef, params)
    convert.save_model(model, out, raw)
    write({"stage": "end", **evaluate_grounding(model, maker, config.seed, config.eval_scenes)})
    log.close()


def main(
    config: PretrainConfig,
    *,
    workdir: str = "",  # directory for the log
    out: str,  # where the Hugging Face directory goes
) -> None:
    workdir = command.make_workdir(workdir)
    with local_directory(open_path(out)) as here:
        pretrain(config, workdir, here)
