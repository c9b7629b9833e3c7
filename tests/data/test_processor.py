"""The processor against transformers' own, and what it refuses."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from agent_fakes import make_image
from tokenizers import Tokenizer

from rsagent_jax.agent import environment, prompts
from rsagent_jax.agent.views import PixelLimits
from rsagent_jax.config.schema import AgentConfig, SamplingConfig
from rsagent_jax.data.processor import ImageConfig, Processor, image_patches, unpatchify
from rsagent_jax.models.qwen25_vl.positions import fill_patch_buffer, mrope_positions
from tests.refusals import refused
from tests.rollout import small

SIZES = [(112, 112), (56, 84), (100, 130), (37, 300), (640, 480), (20, 20), (333, 41), (84, 84), (113, 57)]


@pytest.mark.parametrize("limits", [(56 * 56, 112 * 112), (3136, 12_845_056), (12544, 12544)])
def test_patches_are_those_of_transformers(limits):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    theirs = Qwen2VLImageProcessorPil(min_pixels=limits[0], max_pixels=limits[1])
    config = dataclasses.replace(small.processor().images, limits=PixelLimits(28, *limits))
    for i, (h, w) in enumerate(SIZES):
        image = make_image(h, w, seed=i)
        wanted = theirs(images=[image], return_tensors="np")
        patches, grid = image_patches(image, config)
        assert [list(grid)] == wanted["image_grid_thw"].tolist(), (h, w)
        assert patches.dtype == np.float32
        np.testing.assert_allclose(patches, wanted["pixel_values"], rtol=0, atol=1e-6, err_msg=f"{h}x{w}")


def test_a_rows_pictures_come_back_from_its_patch_buffer():
    """Two images, one of which leaves windows partly empty."""
    processor = small.processor()
    config = dataclasses.replace(processor.images, limits=PixelLimits(28, 3136, 12_845_056))
    images = [make_image(112, 112, seed=0), make_image(56, 140, seed=1)]
    patches, grids = zip(*[image_patches(i, config) for i in images], strict=True)
    is_image = np.ones(16 + 10, bool)
    buffer = fill_patch_buffer(np.concatenate(patches), grids, is_image, 256, processor.config.vision)
    found = unpatchify(buffer.patches, buffer.segment_ids, buffer.positions, config)
    assert len(found) == 2
    for image, back in zip(images, found, strict=True):
        np.testing.assert_array_equal(back, image)
    assert unpatchify(buffer.patches, np.zeros_like(buffer.segment_ids), buffer.positions, config) == []


@pytest.mark.parametrize("size", [(29, 5700), (40, 300), (7, 1400), (60, 100)])
@pytest.mark.parametrize("limits", [(3136, 12_845_056), (12544, 12544), (3136, 12544)])
def test_a_view_is_never_resized_on_its_way_to_the_model(size, limits):
    """Also where its picture fits no size between the weights' limits and is shown below their minimum."""
    processor = small.processor()
    config = dataclasses.replace(processor.images, limits=PixelLimits(28, *limits))
    state = environment.reset(make_image(*size), "it", AgentConfig(), config.limits)
    shown = environment.opening_observation(state).image
    processor = Processor(processor.tokenizer, config, processor.config)
    prompt, _ = processor.prompt(prompts.IMAGE, [shown], limits=state.limits)
    assert prompt.grids == ((1, shown.shape[0] // 14, shown.shape[1] // 14),)
    assert shown.shape[1::-1] == state.view.size_view
    buffer = fill_patch_buffer(
        prompt.patches, prompt.grids, np.ones(len(prompt.patches) // 4, bool), 8192, processor.config.vision
    )
    np.testing.assert_array_equal(unpatchify(buffer.patches, buffer.segment_ids, buffer.positions, config)[0], shown)


def test_a_text_with_two_images_has_each_placeholder_widened_to_its_own_image():
    p, one, two = small.processor(), make_image(112, 112, 1), make_image(56, 84, 2)
    text = f"a{prompts.IMAGE}b{prompts.IMAGE}c"
    prompt, end = p.prompt(text, [one, two], start=5)
    assert prompt.grids == ((1, 8, 8), (1, 4, 6))
    pad, ids = p.image_id, [int(p.tokenizer.token_to_id(t)) for t in ("<|vision_start|>", "<|vision_end|>")]
    a, b, c = (p.encode(t).tolist() for t in "abc")
    assert prompt.tokens.tolist() == [*a, ids[0], *[pad] * 16, ids[1], *b, ids[0], *[pad] * 6, ids[1], *c]
    np.testing.assert_array_equal(prompt.patches[:64], image_patches(one, p.images)[0])
    np.testing.assert_array_equal(prompt.patches[64:], image_patches(two, p.images)[0])
    positions, wanted_end = mrope_positions(prompt.tokens, prompt.grids, pad, 5)
    np.testing.assert_array_equal(prompt.positions, positions)
    # a, <start> at 5, 6; the first image is 4 x 4; <end>, b, <start>; the second is 2 x 3; <end>, c
    assert end == wanted_end == 5 + 2 + 4 + 3 + 3 + 2
    np.testing.assert_array_equal(prompt.positions[:, 2:4], [[7, 7], [7, 7], [7, 8]])


@pytest.mark.parametrize("images", [0, 1, 3])
def test_placeholders_that_are_not_the_images_are_an_error(images):
    with pytest.raises(ValueError, match=f"2 image placeholders for {images} images"):
        small.processor().prompt(prompts.IMAGE * 2, [make_image(56, 56)] * images)


def test_pieces_encoded_one_by_one_decode_to_their_text():
    p = small.processor()
    text = prompts.opening(prompts.system_prompt("full"), 'Segment "größer 猫 🐈" in it.')
    assert p.decode(p.encode(text)) == text
    assert p.encode("<|im_end|>").tolist() == [p.terminator_id]
    assert p.encode("").shape == (0,) and p.prompt("", [])[0].patches.shape == (0, 1176)


def test_a_tokenizer_of_another_model_is_a_data_error():
    p = small.processor()
    other = dataclasses.replace(p.config, image_token_id=p.config.image_token_id + 1)
    refused("of different models", Processor, p.tokenizer, p.images, other)
    raw = json.loads(p.tokenizer.to_str())
    for token in ("<|im_end|>", "<|image_pad|>"):
        other = {**raw, "added_tokens": [t for t in raw["added_tokens"] if t["content"] != token]}
        refused(r"not a Qwen2\.5-VL tokenizer", Processor, Tokenizer.from_str(json.dumps(other)), p.images, p.config)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, ""),
        (b"{", ""),
        (b"{}", ""),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", " is a Git-LFS pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html><html>Log in</html>", " is an HTML page"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json"])
def test_a_file_that_is_missing_broken_or_what_a_download_left_in_its_place_is_one_data_error(
    name, content, said, tmp_path
):
    (small.policy_files(tmp_path) / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(f"{name}{said}", Processor.load, tmp_path)


SETTINGS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "min_pixels": 3136, "max_pixels": 50176}
NEITHER = {"min_pixels": None, "max_pixels": None}


def images_of(directory, vision=None, **settings):
    (directory / "preprocessor_config.json").write_text(json.dumps(SETTINGS | settings))
    return ImageConfig.load(directory, vision)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"min_pixels": 3136.0},
        NEITHER | {"size": {"shortest_edge": 3136, "longest_edge": 50176}},
        NEITHER | {"size": {"min_pixels": 3136, "max_pixels": 50176}},
        {"min_pixels": None, "size": {"shortest_edge": 3136, "longest_edge": 12544}},  # max_pixels goes before size
        {"size": {"shortest_edge": 1, "longest_edge": 12544}},
    ],
)
def test_pixel_limits_are_read_in_all_of_the_hubs_spellings_as_transformers_does(sizes, tmp_path):
    config = images_of(tmp_path, **sizes)
    assert config.limits == PixelLimits(28, 3136, 50176)
    assert (config.patch_size, config.temporal_patch_size, config.merge_size) == (14, 2, 2)
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path).size
    edges = (theirs.shortest_edge or theirs.min_pixels, theirs.longest_edge or theirs.max_pixels)
    assert edges == (config.limits.min_pixels, config.limits.max_pixels)


def test_what_transformers_5_saves_is_read_and_goes_before_an_older_file(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    processor = transformers.AutoProcessor.from_pretrained(small.policy_files(tmp_path))
    processor.image_processor.size = {"shortest_edge": 3136, "longest_edge": 200704}
    processor.save_pretrained(tmp_path / "saved")
    shutil.copyfile(tmp_path / "config.json", tmp_path / "saved" / "config.json")
    assert not (tmp_path / "saved" / "preprocessor_config.json").exists()
    want = dataclasses.replace(small.processor().images, limits=PixelLimits(28, 3136, 200704))
    assert Processor.load(tmp_path / "saved").images == want
    images_of(tmp_path / "saved")
    assert Processor.load(tmp_path / "saved").images == want
    assert transformers.AutoImageProcessor.from_pretrained(tmp_path / "saved").size.longest_edge == 200704
    (tmp_path / "saved" / "processor_config.json").write_text('{"processor_class": "Qwen2_5_VLProcessor"}')  # as by 4
    assert Processor.load(tmp_path / "saved").images.limits.max_pixels == 50176


def test_image_settings_that_make_no_sense_are_one_error_that_lists_them(tmp_path):
    bad = {"min_pixels": "abc", "max_pixels": 50176.5, "image_mean": 0.5, "image_std": [0.5, 0, 0.5]}
    bad |= {"patch_size": 0, "temporal_patch_size": True}
    said = refused(f"^{re.escape(str(tmp_path))}/preprocessor_config.json", images_of, tmp_path, **bad)
    for name, value in (bad | {"image_mean": 0.5, "image_std": [0.5, 0.0, 0.5]}).items():
        assert f"{name} is {value!r}, it must be" in said or f"{name} is {value!r}," in said, name
    for settings, problem in (
        ({"min_pixels": 50177}, "need 1 <= min_pixels <= max_pixels"),
        (NEITHER | {"size": 448}, "size is 448"),
        (NEITHER | {"size": {"height": 448, "width": 448}}, r"lacks min_pixels \(or size.shortest_edge\); lacks max"),
        (NEITHER | {"size": {"shortest_edge": 1, "min_pixels": 2, "longest_edge": 3}}, "has both size.shortest_edge"),
        ({"min_pixels": 0}, "min_pixels is 0"),
        ({"max_pixels": "50176"}, "max_pixels is '50176'"),  # transformers reads it, and cannot compare it
    ):
        refused(problem, images_of, tmp_path, **settings)


def test_sizes_that_contradict_config_json_and_steps_that_are_not_implemented_are_one_error(tmp_path):
    vision = dataclasses.replace(small.processor().config.vision, temporal_patch_size=1)
    ours = {"do_resize": True, "do_convert_rgb": True, "resample": 3, "rescale_factor": 0.003921568859368563}
    assert images_of(tmp_path, small.processor().config.vision, **ours).patch_size == 14  # 1 / 255 of a float32
    bad = {"do_resize": False, "do_normalize": None, "do_rescale": False, "do_convert_rgb": False, "resample": 2}
    said = refused(
        "preprocessor_config", images_of, tmp_path, vision, patch_size=16, merge_size=1, rescale_factor=1 / 127.5, **bad
    )
    for problem in (
        "patch_size is 16, config.json's vision_config.patch_size is 14",
        "merge_size is 1, config.json's vision_config.spatial_merge_size is 2",
        "temporal_patch_size is 2, config.json's vision_config.temporal_patch_size is 1",
        "rescale_factor is 0.00784",
        *(f"{name} is {value!r}, only" for name, value in bad.items()),
    ):
        assert problem in said


def test_eos_of_generation_config_ends_a_turn_and_that_of_config_json_where_there_is_none(tmp_path):
    end = small.processor().terminator_id

    def ends(generation=None, config=end):
        (tmp_path / "generation_config.json").unlink(missing_ok=True)
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return Processor.load(small.policy_files(tmp_path, {"config.json": {"eos_token_id": config}})).end_ids

    assert ends() == {end} and ends(config=[end, 3]) == {end, 3} and ends(config=3) == {end, 3}
    assert ends({"eos_token_id": [end, 4]}, config=3) == {end, 4} and ends({"eos_token_id": 4}) == {end, 4}
    assert ends({"temperature": 1e-6}, config=3) == {end, 3}
    ends({"eos_token_id": [end, 4]})
    sampling = Processor.load(tmp_path).with_ends(SamplingConfig(stop_ids=(7, 4)))
    assert sampling == SamplingConfig(stop_ids=tuple(sorted({4, 7, end})))
    for bad in ("<|im_end|>", [end, "x"], -1, [True], 2.0):
        refused(r"generation_config\.json: eos_token_id = .* is neither a token id nor", ends, {"eos_token_id": bad})
        refused(r"/config\.json: eos_token_id = .* is neither a token id nor", ends, config=bad)
