"""SAM 2 and 2.1 by Meta's sam2 package: masks equal to SAM2ImagePredictor's, images and prompts in batches.

The predictor keeps one image and answers one prompt. Here every image's features are a value (Encoding) that the caller
keeps, and prompts on different images are decoded together. A batch of one runs the package's own modules on tensors of
the predictor's own shapes, so it gives the predictor's bits. A larger batch pads prompts to one length; the padding is
hidden from attention, because SAM 2 was trained with exactly one "not a point" token after the clicks.

Easily missed of what the predictor does: a box is two points (labels 2 and 3) before the clicks; images are stretched
to a square; `no_mem_embed` is added to the lowest level; a single mask falls back to the best of three when it is not
stable (build_sam2 switches that on).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.machinery
import os
import pathlib
import re
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from sam_bridge.backends import (
    DTYPES,
    MULTIMASK,
    RANDOM,
    SAM2_MODELS,
    BackendError,
    DeadDevice,
    Decoded,
    Mask,
    Options,
    PackedMask,
)
from sam_bridge.batching import Lane
from sam_bridge.cpu_tuning import threads_of_each
from sam_bridge.hub import sha256_of
from sam_bridge.types import SegmentRequest

_KEPT = []  # a library's declarations go when it does


def _declare_operators() -> None:
    """Makes torchvision importable beside a CPU build of torch that its compiled operators do not fit.

    It then fails while it describes `nms`. Declared before, the operator exists without a body, and nobody calls it.
    """
    spec = importlib.machinery.PathFinder.find_spec("torchvision")
    if spec is None or spec.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return
    try:
        torch.ops.load_library(pathlib.Path(spec.origin).parent / "_C.so")
    except OSError:
        _KEPT.append(torch.library.Library("torchvision", "DEF"))
        for operator in ("nms", "qnms"):
            _KEPT[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_declare_operators()

from sam2.build_sam import HF_MODEL_ID_TO_FILENAMES, build_sam2  # noqa: E402
from sam2.utils.transforms import SAM2Transforms  # noqa: E402

DEFAULT_BATCH = {"cpu": (1, 1), "cuda": (8, 32)}  # (images, prompts); for a CPU see docs/sidecar.md
CONCURRENCY = 64  # calls let in at a time: the lanes need a crowd to make batches of
# One of SAM2_MODELS -> the package's configuration of it; the checkpoint's file is the name with _hiera in it.
CONFIG_FILES = {re.sub(r"_hiera|\.pt$", "", file): config for config, file in HF_MODEL_ID_TO_FILENAMES.values()}
Prepared = tuple[torch.Tensor, int, int]
LOGIT_CLAMP = 32.0  # the predictor's, of the logits that refine a mask


@dataclasses.dataclass(frozen=True)
class Sam2Encoding:
    """An image's features, [1, C, H, W] each, where the lane's device is: 16 MB in fp32."""

    embed: torch.Tensor
    high_res: tuple[torch.Tensor, torch.Tensor]
    height: int
    width: int
    lane: int


@dataclasses.dataclass(frozen=True)
class _Job:
    encoding: Sam2Encoding
    request: SegmentRequest
    logits: torch.Tensor | None


class Sam2:
    """Back end. One model and one lane for each device."""

    name = "sam2"
    concurrency = CONCURRENCY

    def __init__(self, options: Options, resolution: int = 1024):
        """BackendError when the checkpoint, the model or the device cannot be had. `resolution` other than SAM 2's own
        1024 is for quick tests."""
        model_name = _model_name(options)
        for field, allowed in (("dtype", DTYPES), ("multimask", MULTIMASK)):
            if getattr(options, field) not in allowed:
                raise BackendError(f"{field} {getattr(options, field)!r} is none of {', '.join(allowed)}")
        self.options = options
        devices = [_device(name) for name in options.device.split(",")]
        if any(device.type == "cpu" for device in devices):
            torch.set_num_threads(options.threads or threads_of_each(len(devices)))
        weights = _read_checkpoint(options.checkpoint)
        # In a thread that ends. OpenMP keeps a team for every thread that ever shared work out, and with more threads
        # in teams than cores all of them sleep between two operations: without a GPU nobody but the lanes may have one.
        with ThreadPoolExecutor(1) as once:
            build = [once.submit(_Model, model_name, weights, device, options, resolution) for device in devices]
        self._models = [model.result() for model in build]
        digest = RANDOM if weights is None else sha256_of(pathlib.Path(options.checkpoint))[:16]
        self.identity = f"sam2 {model_name} {digest} {options.dtype} {options.multimask}"
        if resolution != 1024:
            self.identity += f" {resolution}"
        self._lanes = [self._lane(i, model) for i, model in enumerate(self._models)]
        # Beside the lanes, so that a GPU does not wait for a resize; where there is none, the lanes do it themselves.
        gpu = any(device.type == "cuda" for device in devices)
        self._preparers = ThreadPoolExecutor(4, thread_name_prefix="sam2 prepare") if gpu else None
        for lane, model in zip(self._lanes, self._models, strict=True):
            if model.device.type == "cuda":  # the first call on a GPU takes seconds
                encoding = lane.call("encode", np.zeros((8, 8, 3), np.uint8))
                lane.call("decode", _Job(encoding, SegmentRequest(points=((4.0, 4.0),), labels=(1,)), None))

    def encode(self, image: np.ndarray) -> tuple[Sam2Encoding, int]:
        """u8[h, w, 3] -> features on the device that has least to do."""
        if self._preparers is not None:  # before a lane is chosen: what is being prepared is nobody's load yet
            image = self._preparers.submit(self._models[0].prepare, image).result()
        lane = min(self._lanes, key=lambda lane: (lane.load, lane.items["encode"]))
        encoding = lane.call("encode", image)
        tensors = (encoding.embed, *encoding.high_res)
        return encoding, sum(t.numel() * t.element_size() for t in tensors)

    def decode(self, encoding: Sam2Encoding, request: SegmentRequest, logits: torch.Tensor | None) -> Decoded:
        """`logits` f32[1, H, W] of the mask to refine, at a quarter of the model's resolution, where its lane is."""
        return self._lanes[encoding.lane].call("decode", _Job(encoding, request, logits))

    def counters(self) -> dict[str, float]:
        """Batches run and items in them, over all devices."""
        return {
            f"{kind}_{what}": sum(getattr(lane, what)[kind] for lane in self._lanes)
            for kind in ("encode", "decode")
            for what in ("batches", "items")
        }

    def close(self) -> None:
        """Ends the threads; waiting calls fail."""
        for lane in self._lanes:
            lane.close()
        if self._preparers is not None:
            self._preparers.shutdown(wait=False, cancel_futures=True)

    def _lane(self, index: int, model: _Model) -> Lane:
        images, prompts = DEFAULT_BATCH[model.device.type]
        works = {
            "encode": (lambda batch: model.encode(batch, index), self.options.encode_batch or images),
            "decode": (model.decode, self.options.decode_batch or prompts),
        }
        return Lane(f"sam2 {model.device}", works)


class _Model:
    """A model on its device. Only its lane's thread calls `encode` and `decode`."""

    def __init__(self, name: str, weights: dict | None, device: torch.device, options: Options, resolution: int):
        self.device, self.multimask, self.bf16 = device, options.multimask, options.dtype == "bfloat16"
        self._net = _build(name, weights, device, resolution)
        self._transforms = SAM2Transforms(resolution, mask_threshold=0.0)
        decoder = self._net.sam_mask_decoder
        self._padding = _hide_padding(decoder.transformer)
        self._own_tokens = int(decoder.pred_obj_scores) + 1 + decoder.num_mask_tokens  # before the prompt's
        self._places = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=device)  # of bits
        with self._context():
            self._image_pe = self._net.sam_prompt_encoder.get_dense_pe()

    def prepare(self, image: np.ndarray) -> Prepared:
        """u8[h, w, 3] -> (f32[3, R, R] stretched and normalised, h, w). On the CPU, as the predictor does it."""
        with torch.inference_mode():
            return self._transforms(np.array(image)), image.shape[0], image.shape[1]

    def encode(self, images: list[np.ndarray | Prepared], lane: int) -> list[Sam2Encoding]:
        """Of pictures u8[h, w, 3], or of what `prepare` made of them."""
        prepared = [self.prepare(image) if isinstance(image, np.ndarray) else image for image in images]
        with self._context():
            batch = torch.stack([pixels for pixels, _, _ in prepared]).to(self.device)
            out = self._net.forward_image(batch)
            _, levels, _, sizes = self._net._prepare_backbone_features(out)
            if self._net.directly_add_no_mem_embed:
                levels[-1] = levels[-1] + self._net.no_mem_embed
            n = len(prepared)
            levels = [x.permute(1, 2, 0).view(n, -1, *size) for x, size in zip(levels, sizes, strict=True)]
            encodings = []
            for i, (_, height, width) in enumerate(prepared):
                # A view into a batch would keep all of it alive.
                s0, s1, embed = (x if n == 1 else x[i : i + 1].clone() for x in levels)
                encodings.append(Sam2Encoding(embed, (s0, s1), height, width, lane))
            return encodings

    def decode(self, jobs: list[_Job]) -> list[Decoded]:
        with self._context():
            found = self._decode(jobs, [self._wants_three(job.request) for job in jobs])
            return [self._finish(job, masks, scores) for job, (masks, scores) in zip(jobs, found, strict=True)]

    def _wants_three(self, request: SegmentRequest) -> bool:
        """Whether the prompt is ambiguous (a click alone may mean a shirt or the person in it), or all are wanted."""
        alone = len(request.points) == 1 and request.box is None and not request.refine_logits_id
        return request.candidates or self.multimask == "always" or (self.multimask == "point" and alone)

    def _decode(self, jobs: list[_Job], three: list[bool]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """[(logits [C, H, W], scores [C])], C = 3 where `three`, else 1."""
        decoder = self._net.sam_mask_decoder
        sparse, shown = self._sparse(jobs)
        self._padding.shown = None if shown.all() else shown[:, None, None, :].to(self.device)
        try:
            masks, scores, _, _ = decoder.predict_masks(
                image_embeddings=_batch([job.encoding.embed for job in jobs]),
                image_pe=self._image_pe,
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=self._dense(jobs),
                repeat_image=False,
                high_res_features=[_batch([job.encoding.high_res[level] for job in jobs]) for level in (0, 1)],
            )
        finally:
            self._padding.shown = None
        single, single_scores = masks[:, :1], scores[:, :1]
        if decoder.dynamic_multimask_via_stability and not all(three):
            single, single_scores = decoder._dynamic_multimask_via_stability(masks, scores)
        return [(masks[i, 1:], scores[i, 1:]) if three[i] else (single[i], single_scores[i]) for i in range(len(jobs))]

    def _sparse(self, jobs: list[_Job]) -> tuple[torch.Tensor, torch.Tensor]:
        """(embeddings [B, N, D], bool[B, own tokens + N] of what attention may see, on the CPU)."""
        prompts = [self._points(job) for job in jobs]
        longest = max(len(labels) for _, labels in prompts)
        shown = torch.ones(len(jobs), self._own_tokens + (longest + 1 if longest else 0), dtype=torch.bool)
        if not longest:  # every job only refines: the predictor then gives no tokens at all
            sparse, _ = self._net.sam_prompt_encoder(points=None, boxes=None, masks=None)
            return sparse.expand(len(jobs), -1, -1), shown
        coords = torch.zeros(len(jobs), longest, 2, device=self.device)
        labels = torch.full((len(jobs), longest), -1, dtype=torch.int, device=self.device)
        for i, (xy, kinds) in enumerate(prompts):
            coords[i, : len(kinds)], labels[i, : len(kinds)] = xy, kinds
            shown[i, self._own_tokens + len(kinds) :] = False
            shown[i, -1] = len(kinds) > 0  # the one "not a point" token, which the encoder appends to clicks
        sparse, _ = self._net.sam_prompt_encoder(points=(coords, labels), boxes=None, masks=None)
        return sparse, shown

    def _dense(self, jobs: list[_Job]) -> torch.Tensor:
        """[B, D, H, W]: the embedded masks that are refined, "no mask" elsewhere."""
        encoder = self._net.sam_prompt_encoder
        none = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        dense = none.expand(len(jobs), -1, *encoder.image_embedding_size)
        refining = [i for i, job in enumerate(jobs) if job.logits is not None]
        if refining:
            stacked = torch.stack([jobs[i].logits.to(self.device) for i in refining])
            embedded = encoder._embed_masks(stacked)
            if len(jobs) == 1:  # as it is: under autocast it is bf16
                return embedded
            dense = dense.clone()
            dense[refining] = embedded.to(dense.dtype)
        return dense

    def _points(self, job: _Job) -> tuple[torch.Tensor, torch.Tensor]:
        """(f32[N, 2] in the model's pixels, i32[N]): the box's corners as labels 2 and 3, then the clicks."""
        request, size = job.request, (job.encoding.height, job.encoding.width)
        corners = [] if request.box is None else [request.box[:2], request.box[2:]]
        places = np.asarray([*corners, *request.points], np.float64).reshape(-1, 2)
        coords = torch.as_tensor(places, dtype=torch.float, device=self.device)
        labels = torch.tensor([2, 3][: len(corners)] + list(request.labels), dtype=torch.int, device=self.device)
        return self._transforms.transform_coords(coords, normalize=True, orig_hw=size), labels

    def _finish(self, job: _Job, masks: torch.Tensor, scores: torch.Tensor) -> Decoded:
        """The mask with the best score, enlarged to the image: bilinear, then > 0."""
        scores = scores.float().tolist()  # at once: every look at a GPU's values waits for it
        best = scores.index(max(scores))
        low, size = masks[best : best + 1], (job.encoding.height, job.encoding.width)
        large = self._transforms.postprocess_masks(low[None], size)[0, 0]
        logits = low.clamp(-LOGIT_CLAMP, LOGIT_CLAMP).float()  # stay there, for whoever refines the mask
        candidates = ()
        if job.request.candidates:
            every = self._transforms.postprocess_masks(masks[None], size)[0]
            candidates = tuple(self._to_host(mask) for mask in every > 0.0)
        return Decoded(self._to_host(large > 0.0), scores[best], logits, candidates)

    def _to_host(self, mask: torch.Tensor) -> Mask:
        """bool[h, w]; from a GPU as bits, an eighth of the bytes."""
        return mask.numpy() if mask.device.type == "cpu" else PackedMask(self._pack(mask).cpu().numpy(), *mask.shape)

    def _pack(self, mask: torch.Tensor) -> torch.Tensor:
        """bool[h, w] -> PackedMask.bits, on the device."""
        pixels = torch.nn.functional.pad(mask.flatten(), (0, -mask.numel() % 8)).view(-1, 8)
        return (pixels * self._places).sum(dim=1, dtype=torch.uint8)

    @contextlib.contextmanager
    def _context(self):
        """No gradients, bf16 where asked for; a device that is gone is told from a call that failed."""
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            try:
                yield
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                raise
            except RuntimeError as error:
                if "CUDA error" in str(error):
                    raise DeadDevice(f"{self.device}: {error}") from error
                raise


class _OverTokens(torch.nn.Module):
    """An attention of the package whose keys are the prompt's tokens; leaves padding out while there is some."""

    def __init__(self, attention: torch.nn.Module, padding: types.SimpleNamespace):
        super().__init__()
        self.attention, self.padding = attention, padding

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.padding.shown is None:
            return self.attention(q=q, k=k, v=v)
        a = self.attention
        q, k, v = (a._separate_heads(f(x), a.num_heads) for f, x in ((a.q_proj, q), (a.k_proj, k), (a.v_proj, v)))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.padding.shown)
        return a.out_proj(a._recombine_heads(out))


def _hide_padding(transformer: torch.nn.Module) -> types.SimpleNamespace:
    """Wraps the attentions over tokens; the others have the image as keys, which is never padded.

    `shown` of what is returned says what attention may see now: bool[B, 1, 1, tokens], or None for everything.
    """
    padding = types.SimpleNamespace(shown=None)
    for layer in transformer.layers:
        layer.self_attn = _OverTokens(layer.self_attn, padding)
        layer.cross_attn_image_to_token = _OverTokens(layer.cross_attn_image_to_token, padding)
    return padding


def _batch(tensors: list[torch.Tensor]) -> torch.Tensor:
    """[1, …] each -> [B, …], without a copy when all are the same image."""
    if all(t is tensors[0] for t in tensors):
        return tensors[0].expand(len(tensors), *tensors[0].shape[1:])
    return torch.cat(tensors)


def _build(name: str, weights: dict | None, device: torch.device, resolution: int) -> torch.nn.Module:
    extra = [] if resolution == 1024 else [f"++model.image_size={resolution}"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # random weights are the same in every process
        net = build_sam2(CONFIG_FILES[name], None, device="cpu", hydra_overrides_extra=extra)
    if weights is not None:
        try:
            net.load_state_dict(weights)
        except RuntimeError as error:
            lines = str(error).splitlines()
            raise BackendError(
                f"the checkpoint is not one of {name}: {' '.join(lines[:3])[:300]}; name its --model"
            ) from error
    return net.to(device)


def _read_checkpoint(path: str) -> dict | None:
    """The state dict, or None for random weights."""
    if path == RANDOM:
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)["model"]
    except FileNotFoundError:
        raise BackendError(f"checkpoint {path} does not exist") from None
    except Exception as error:
        raise BackendError(f"checkpoint {path} cannot be read as one of sam2's: {type(error).__name__}") from error


def _model_name(options: Options) -> str:
    if options.model:
        if options.model not in SAM2_MODELS:
            raise BackendError(f"unknown model {options.model!r}; options: {', '.join(SAM2_MODELS)}")
        return options.model
    named = re.search(r"(sam2(?:\.1)?)_hiera_(tiny|small|base_plus|large)", os.path.basename(options.checkpoint))
    if named:
        return f"{named[1]}_{named[2]}"
    if options.checkpoint == RANDOM:
        return "sam2.1_tiny"
    raise BackendError(f"the checkpoint's name does not tell its model; give --model, one of {', '.join(SAM2_MODELS)}")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name.strip())
    except RuntimeError:
        raise BackendError(f"unknown device {name!r}; options: cpu, cuda, cuda:0, …") from None
    if device.type not in DEFAULT_BATCH:
        raise BackendError(f"device {name!r} is neither cpu nor cuda")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise BackendError(f"device {name!r} is not there: torch {torch.__version__} finds {found} GPUs")
    return device
