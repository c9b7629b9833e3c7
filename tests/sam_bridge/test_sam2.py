"""The sam2 back end through client and server equals SAM2ImagePredictor called directly. Random weights.

Most of it at an eighth of SAM 2's resolution, which takes a fraction of the time; benchmarks/bridge_exact.py does the
same with 200 prompts per model at full resolution.
"""

import concurrent.futures
import dataclasses

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sam2")

import torch
from sam2.build_sam import HF_MODEL_ID_TO_FILENAMES

from benchmarks import bridge_exact
from sam_bridge.backends import RANDOM, SAM2_MODELS, BackendError, Options, PackedMask, load_backend
from sam_bridge.backends import sam2 as backend
from sam_bridge.local import LocalSegmenter
from sam_bridge.types import SegmentRequest
from tests.sam_bridge.fakes import BOX

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # sam2's transforms

QUICK = 128  # pixels, instead of 1024
SIZES = ((32, 32), (120, 160), (333, 97))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two fight over the cores of a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(the predictor, options that name its weights) of sam2.1 tiny."""
    return made("sam2.1_tiny", tmp_path_factory.mktemp("tiny"))


def made(name, folder, resolution=QUICK):
    reference = bridge_exact.Reference(name, resolution)
    path = reference.save(folder / f"{name.replace('_', '_hiera_', 1)}.pt")
    return reference, Options(checkpoint=path, threads=1, encode_batch=1, decode_batch=1)


def all_equal(result: dict) -> bool:
    return result["prompts"] == result["equal_masks"] == result["equal_scores"] == result["equal_logits"]


def test_bit_for_bit_without_batching(reference):
    predictor, options = reference
    result = bridge_exact.compare(predictor, options, QUICK, 42, SIZES)
    assert all_equal(result) and result["refined"] == 18 and result["encodes"] == len(SIZES)
    assert min(predictor.fallbacks[True], predictor.fallbacks[False]) > 2  # stable single masks and unstable ones


def test_bit_for_bit_when_masks_are_packed_where_they_are_made(reference, monkeypatch):
    """As from a GPU. Heights and widths whose pixels fill their last byte, and that do not."""
    pack = lambda self, mask: PackedMask(self._pack(mask).numpy(), *mask.shape)  # noqa: E731
    monkeypatch.setattr(backend._Model, "_to_host", pack)
    predictor, options = reference
    assert all_equal(bridge_exact.compare(predictor, options, QUICK, 9, ((32, 32), (333, 97), (5, 7))))


def test_in_batches_within_1e_4_and_every_other_pixel_explained(reference):
    predictor, options = reference
    options = dataclasses.replace(options, encode_batch=4, decode_batch=16)
    result = bridge_exact.compare(predictor, options, QUICK, 42, SIZES)
    assert result["mean_batch"] > 1.5
    assert result["worst_logits"] < 1e-4 and result["worst_score"] < 1e-5 and result["unexplained"] == 0


@pytest.mark.slow
def test_full_resolution(tmp_path):
    predictor, options = made("sam2.1_tiny", tmp_path, 1024)
    assert all_equal(bridge_exact.compare(predictor, options, 1024, 3, ((300, 500),)))


def test_sam2_of_the_first_family_and_another_size(tmp_path):
    predictor, options = made("sam2_small", tmp_path)
    assert all_equal(bridge_exact.compare(predictor, options, QUICK, 5, SIZES[:1]))


@pytest.mark.parametrize("change", [{"multimask": "never"}, {"multimask": "always"}, {"dtype": "bfloat16"}])
def test_the_multimask_switch_and_bf16_as_under_autocast(reference, change):
    predictor, options = reference
    with torch.autocast("cpu", torch.bfloat16, enabled="dtype" in change):
        result = bridge_exact.compare(predictor, dataclasses.replace(options, **change), QUICK, 7, SIZES[:1])
    assert all_equal(result)


def test_candidates_are_the_predictors_three_masks(reference, image):
    predictor, options = reference
    segmenter = LocalSegmenter(backend.Sam2(options, QUICK))
    predictor.predictor.set_image(image)
    theirs, scores, _ = predictor.predictor.predict(box=np.array(BOX.box), multimask_output=True)
    ours = segmenter.segment(image, dataclasses.replace(BOX, candidates=True))
    segmenter.close()
    assert len(ours.candidates) == 3 and ours.score == pytest.approx(float(scores.max()), abs=1e-6)
    np.testing.assert_array_equal(np.stack(ours.candidates), theirs.astype(bool))
    np.testing.assert_array_equal(ours.mask, theirs[int(scores.argmax())].astype(bool))


def test_batches_leave_nothing_of_each_other(reference):
    """Encoded together: the same features as alone within rounding, and each keeps only its own memory."""
    sam2 = backend.Sam2(reference[1], QUICK)
    (model,) = sam2._models
    prepared = [model.prepare(image) for image in bridge_exact.random_images(SIZES)]
    alone = [model.encode([one], 0)[0] for one in prepared]
    for one, other in zip(alone, model.encode(prepared, 0), strict=True):
        tensors = (other.embed, *other.high_res)
        # f32: 256 channels at a 16th of the resolution, 32 at a quarter, 64 at an eighth
        assert sum(t.untyped_storage().nbytes() for t in tensors) == 4 * (256 * 8**2 + 32 * 32**2 + 64 * 16**2)
        assert (other.height, other.width) == (one.height, one.width)
        for ours, theirs in zip(tensors, (one.embed, *one.high_res), strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    sam2.close()


def test_two_devices_share_the_images_and_give_equal_masks(reference):
    two = LocalSegmenter(backend.Sam2(dataclasses.replace(reference[1], device="cpu,cpu"), QUICK))
    images = bridge_exact.random_images(((40, 50), (50, 40), (64, 64), (41, 51)))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        masks = list(pool.map(lambda p: two.segment(p, SegmentRequest(box=(3.0, 3.0, 30.0, 30.0))).mask, images))
    assert all(lane.items["encode"] > 0 and lane.items["decode"] > 0 for lane in two.backend._lanes)
    for image, mask in zip(images, masks, strict=True):
        reference[0].predictor.set_image(image)
        enlarged, _, _ = reference[0].predict(SegmentRequest(box=(3.0, 3.0, 30.0, 30.0)), None)
        np.testing.assert_array_equal(mask, enlarged > 0)
    assert two.about.identity.startswith("sam2 sam2.1_tiny ")  # whatever the devices are
    two.close()


def test_random_weights_are_the_same_in_every_process(image):
    masks = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        local = LocalSegmenter(backend.Sam2(Options(checkpoint=RANDOM, threads=1), QUICK))
        masks.append(local.segment(image, BOX).mask)
        local.close()
    np.testing.assert_array_equal(*masks)
    assert 0 < masks[0].mean() < 1


def test_names_and_files_are_the_packages_own():
    table = {file: config for config, file in HF_MODEL_ID_TO_FILENAMES.values()}
    assert len(table) == len(SAM2_MODELS)
    for file, config in table.items():
        name = backend._model_name(Options(checkpoint=f"/some/where/{file}"))
        assert name in SAM2_MODELS and backend.CONFIG_FILES[name] == config


def test_what_cannot_be_had_is_one_clear_error(reference, tmp_path):
    broken = tmp_path / "sam2_hiera_tiny.pt"
    broken.write_bytes(b"no weights")
    (unnamed := tmp_path / "weights.pt").touch()
    path = reference[1].checkpoint
    for options, says in (
        (Options(), "--checkpoint=FILE.pt"),
        (Options(checkpoint="/nowhere/sam2_hiera_tiny.pt"), "does not exist"),
        (Options(checkpoint=str(broken)), "cannot be read"),
        (Options(checkpoint=path, model="sam2_tiny"), "not one of sam2_tiny"),
        (Options(checkpoint=path, model="sam2.1_small"), "not one of sam2.1_small"),
        (Options(checkpoint=path, model="sam3"), "options: sam2.1_tiny"),
        (Options(checkpoint=str(unnamed)), "does not tell its model"),
        (Options(checkpoint=RANDOM, device="tpu"), "unknown device|neither cpu nor cuda"),
        (Options(checkpoint=RANDOM, device="cuda:77"), "is not there"),
        (Options(checkpoint=RANDOM, dtype="float8"), "float32, bfloat16"),
        (Options(checkpoint=RANDOM, multimask="maybe"), "point, never, always"),
    ):
        with pytest.raises(BackendError, match=says):
            load_backend("sam2", options)
    with pytest.raises(BackendError, match="checkpoint: only the sam2 back end"):
        load_backend("grabcut", Options(checkpoint=RANDOM))
