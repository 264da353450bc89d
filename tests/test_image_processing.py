"""Pictures to tiles: bit-equal to plain PIL and transformers' own processors, alone and in a chat, with any option."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_inputs import CLIP, SIDE, SQUARE, assert_rejects, noise, picture, pixels_of, small_processor
from PIL import Image
from transformers import AutoImageProcessor, CLIPImageProcessorPil, SiglipImageProcessorPil
from transformers.processing_utils import ImagesKwargs
from transformers.utils import logging
from vila import VilaImageProcessor, image_processing_vila
from vila.geometry_vila import choose_tile_grid
from vila.image_processing_vila import IMAGE_MODES, VilaImagesKwargs

SIZES = [(1, 1), (SIDE, SIDE), (31, 45), (63, 22), (100, 7), (5, 83), (150, 149)]


# bit equality with plain PIL and transformers


def cut(image, cols, rows):
    resized = image.resize((SIDE * cols, SIDE * rows))
    corners = [(SIDE * col, SIDE * row) for row in range(rows) for col in range(cols)]
    return [resized.crop((left, upper, left + SIDE, upper + SIDE)) for left, upper in corners]


def reference_views(image, mode, mean):
    """What the original hands to the tower's own processor."""
    if mode == "resize":
        return [image.resize((SIDE, SIDE))]
    if mode == "pad":
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return [square]
    if mode == "square":
        left = max(image.width - image.height, 0) // 2
        return [image.crop((left, 0, left + min(image.size), min(image.size)))]
    if mode == "dynamic":
        grid = choose_tile_grid(*image.size, SIDE, 1, 12)
        return cut(image, grid.cols, grid.rows) + ([image.resize((SIDE, SIDE))] if grid.area > 1 else [])
    if mode == "dynamic_s2":
        grid = choose_tile_grid(*image.size, SIDE, 9, 12)
        return cut(image, 1, 1) + cut(image, 2, 2) + cut(image, grid.cols, grid.rows)
    return [image]


def assert_equals_reference(image, mode, tower, options):
    views = reference_views(image, mode, tower.image_mean)
    expected = np.stack([tower(view, return_tensors="np")["pixel_values"][0] for view in views])
    result = pixels_of(image, image_mode=mode, **options)
    assert result.dtype == np.float32
    assert np.array_equal(result, expected)


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("mode", IMAGE_MODES)
def test_siglip_pixels_equal_the_reference(mode, width, height):
    assert_equals_reference(picture(width, height), mode, SiglipImageProcessorPil(size=SQUARE), {})


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("mode", ["resize", "pad", "plain"])
def test_clip_pixels_equal_the_reference(mode, width, height):
    tower = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE)
    assert_equals_reference(picture(width, height), mode, tower, CLIP)


def test_tiles_of_a_clip_tower_go_through_its_own_preprocessing():
    """The tile's side is the crop size; a larger shortest edge then zooms into every tile."""
    edge = SIDE + 6
    tower = CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size=SQUARE)
    image = picture(90, 40)
    data = small_processor(**{**CLIP, "size": {"shortest_edge": edge}, "image_mode": "dynamic"})([image])
    _, rows, cols = data["image_grid_thw"][0]
    resized = image.resize((SIDE * cols, SIDE * rows))
    corners = [(SIDE * col, SIDE * row) for row in range(rows) for col in range(cols)]
    tiles = [resized.crop((left, upper, left + SIDE, upper + SIDE)) for left, upper in corners]
    tiles.append(image.resize((SIDE, SIDE)))
    assert np.array_equal(data["pixel_values"], tower(tiles, return_tensors="np")["pixel_values"])


@pytest.mark.parametrize("crop", [(9, 9), (60, 31), (10, 61), (61, 60)])
def test_crop_larger_than_the_picture_equals_clips(crop):
    crop_size = {"height": crop[0], "width": crop[1]}
    tower = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=crop_size)
    assert_equals_reference(picture(45, 31), "plain", tower, {**CLIP, "crop_size": crop_size})


channel_triples = st.tuples(*[st.floats(0.01, 1)] * 3)


@settings(max_examples=25, deadline=None, database=None)
@given(channel_triples, channel_triples, st.floats(1e-4, 2))
def test_table_equals_rescaling_and_normalising_of_transformers(mean, std, factor):
    every_value = np.stack([np.arange(256, dtype=np.uint8).reshape(16, 16)] * 3, axis=-1)
    options = {"do_resize": False, "image_mean": mean, "image_std": std, "rescale_factor": factor}
    expected = SiglipImageProcessorPil(**options)(every_value, return_tensors="np")["pixel_values"]
    assert np.array_equal(pixels_of(every_value, image_mode="plain", **options), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_resize": False},
        {"do_rescale": False, "do_normalize": False},
        {"do_resize": False, "do_rescale": False, "do_normalize": False},
        {"resample": Image.Resampling.NEAREST},
        {"rescale_factor": 0.5},
        {"image_mean": 0.3, "image_std": 0.7},
    ],
    ids=str,
)
def test_inherited_options_do_what_they_do_in_transformers(options):
    expected = SiglipImageProcessorPil(size=SQUARE)(picture(), return_tensors="np", **options)["pixel_values"]
    assert np.array_equal(small_processor(image_mode="plain")(picture(), **options)["pixel_values"], expected)


@pytest.mark.parametrize(("mode", "size"), [("resize", (31, 45)), ("pad", (45, 45)), ("plain", (31, 45))])
def test_pictures_keep_their_size_without_do_resize(mode, size):
    assert pixels_of(picture(), image_mode=mode, do_resize=False).shape == (1, 3, *size)


def test_pictures_of_different_sizes_are_not_batched_without_do_resize():
    assert_rejects([picture(5, 6), picture(6, 5)], "different sizes", image_mode="plain", do_resize=False)


# conversations


@pytest.fixture
def warnings(monkeypatch):
    """Messages of the module's logger, as in a fresh process."""
    messages = []
    logging.warning_once.cache_clear()
    monkeypatch.setattr(image_processing_vila.logger, "warning", lambda message, *args: messages.append(message))
    return messages


@pytest.mark.parametrize("mode", ["dynamic", "dynamic_s2"])
def test_several_pictures_are_untiled_and_that_is_said_once(mode, warnings):
    processor = small_processor(image_mode=mode)
    several = [picture(90, 30), picture(30, 90)]
    data = processor(several)
    processor([*several, *several])
    assert np.array_equal(data["pixel_values"], pixels_of(several, image_mode="plain"))
    assert data["image_grid_thw"].tolist() == [[1, 1, 1]] * 2
    assert len(warnings) == 1
    assert "tile_multiple_images" in warnings[0]


@pytest.mark.parametrize("mode", ["dynamic", "dynamic_s2"])
def test_several_pictures_are_tiled_like_single_ones_on_demand(mode, warnings):
    processor = small_processor(image_mode=mode)
    several = [picture(90, 30), picture(30, 90), picture(1, 1)]
    data = processor(several, tile_multiple_images=True)
    singles = [processor(single) for single in several]
    for name in ("pixel_values", "image_grid_thw"):
        assert np.array_equal(data[name], np.concatenate([single[name] for single in singles]))
    assert warnings == []


def test_nested_list_is_one_conversation_each():
    """A conversation with one picture is tiled beside one with two, which is not."""
    processor = small_processor(image_mode="dynamic")
    lone, first, second = picture(90, 30), picture(30, 90), picture(60, 60)
    data = processor([[lone], [], [first, second]])
    parts = [processor([lone]), processor([first, second])]
    for name in ("pixel_values", "image_grid_thw"):
        assert np.array_equal(data[name], np.concatenate([part[name] for part in parts]))


@pytest.mark.parametrize("images", [[], [[]], (), [[], []]], ids=str)
def test_no_picture_is_refused(images):
    assert_rejects(images, "no picture")


def test_mixed_nesting_is_refused():
    assert_rejects([picture(), [picture()]], "mixes")


@pytest.mark.parametrize("bad", [np.zeros((6, 6, 5)), b"", "missing.png"], ids=["array", "bytes", "path"])
def test_error_names_the_picture_of_the_batch(bad):
    assert_rejects([[picture()], [picture(), bad]], "^conversation 1: picture 1: ")


# options


def as_dict(data):
    return {name: np.asarray(value).tolist() for name, value in data.items()}


OWN_OPTIONS = {
    "image_mode": ("pad", {}),
    "min_tiles": (7, {"image_mode": "dynamic"}),
    "max_tiles": (2, {"image_mode": "dynamic"}),
    "s2_scales": ([SIDE, 2 * SIDE], {"image_mode": "dynamic_s2"}),
    "tile_multiple_images": (True, {"image_mode": "dynamic"}),
    "background_color": ([10, 20, 30], {}),
    "media_policy": ({"max_pixels": 1}, {}),
}
INHERITED_OPTIONS = {
    "size": ({"height": 8, "width": 8}, {}),
    "crop_size": ({"height": 8, "width": 8}, CLIP),
    "do_center_crop": (True, {"crop_size": 8}),
    "resample": (Image.Resampling.NEAREST, {"image_mode": "plain"}),
    "do_resize": (False, {}),
    "do_rescale": (False, {}),
    "rescale_factor": (0.25, {}),
    "do_normalize": (False, {}),
    "image_mean": ([0.1, 0.2, 0.3], {}),
    "image_std": ([0.1, 0.2, 0.3], {}),
}


def transparent_pair():
    return [Image.fromarray(noise(60, 35, channels=4)), Image.fromarray(noise(60, 35, channels=4))]


def test_every_option_of_our_own_is_tried():
    assert set(OWN_OPTIONS) == set(VilaImagesKwargs.__annotations__) - set(ImagesKwargs.__annotations__)


@pytest.mark.parametrize("name", sorted((OWN_OPTIONS | INHERITED_OPTIONS).keys() - {"media_policy"}))
def test_option_has_the_same_effect_at_call_time_as_in_the_constructor(name):
    value, others = (OWN_OPTIONS | INHERITED_OPTIONS)[name]
    images = transparent_pair() if name == "tile_multiple_images" else transparent_pair()[0]
    without = as_dict(small_processor(**others)(images))
    processor = small_processor(**others)
    at_call = as_dict(processor(images, **{name: value}))
    assert at_call != without
    assert as_dict(small_processor(**{**others, name: value})(images)) == at_call
    assert as_dict(processor(images)) == without


@pytest.mark.parametrize(("square", "size"), [(True, (8, 8)), (False, (8, 11))])
def test_size_of_one_number_is_a_square_by_default(square, size):
    data = small_processor()(picture(), image_mode="plain", size=8, default_to_square=square)
    assert data["pixel_values"].shape[2:] == size


@pytest.mark.parametrize(("kind", "container"), [("np", np.ndarray), ("pt", torch.Tensor), (None, np.ndarray)])
def test_tensors_are_of_the_kind_asked_for(kind, container):
    data = small_processor()(picture(), return_tensors=kind)
    assert all(isinstance(data[name], container) for name in ("pixel_values", "image_grid_thw"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_tiles": "12"}, "max_tiles"),
        ({"min_tiles": ...}, "min_tiles"),
        ({"background_color": 7}, "background_color"),
        ({"tile_multiple_images": "SECRET"}, "tile_multiple_images"),
        ({"media_policy": "SECRET"}, "media_policy"),
        ({"image_mode": "dynamic", "min_tiles": 0}, "min_tiles"),
        ({"image_mode": "dynamic", "max_tiles": -1}, "max_tiles"),
        ({"image_mode": "dynamic", "max_tiles": 10**9}, "max_tiles"),
        ({"image_mode": "dynamic_s2", "max_tiles": 8}, "max_tiles"),
        ({"image_mode": "dynamic_s2", "s2_scales": []}, "s2_scales"),
        ({"image_mode": "dynamic_s2", "s2_scales": [0, 8]}, "s2_scales"),
        ({"image_mode": "dynamic_s2", "s2_scales": [16, 8]}, "s2_scales"),
        ({"image_mode": "dynamic", "size": {"height": 8, "width": 9}}, "size"),
        ({"image_mode": "dynamic", "do_resize": False}, "do_resize"),
        ({"image_mode": "resize", "size": {"shortest_edge": 8}}, "size"),
        ({"image_mode": "plain", "size": {"longest_edge": 8}}, "size"),
        ({"image_mode": "plain", "size": {"shortest_edge": 8, "longest_edge": 9}}, "size"),
        ({"size": {"height": 0, "width": 8}}, "size"),
        ({"do_center_crop": True, "crop_size": {"height": -1, "width": 8}}, "crop_size"),
        ({"background_color": [1, 2]}, "background_color"),
        ({"background_color": [1, 2, 256]}, "background_color"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_std": [0.5, 0.5], "image_mode": "pad"}, "image_std"),
        ({"image_std": [0.5, 0.5, 0.0]}, "image_std"),
        ({"image_mean": None, "do_normalize": False, "image_mode": "pad"}, "image_mean"),
        ({"data_format": "channels_last"}, "data_format"),
        ({"do_pad": True, "pad_size": 9}, "do_pad"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_bad_option_is_refused_by_name(options, match):
    assert_rejects(picture(), match, **options)


@pytest.mark.parametrize(
    "options",
    [{"max_tiles": "12"}, {"s2_scales": "448"}, {"image_mode": ["dynamic"]}, {"background_color": 7}],
    ids=str,
)
def test_an_option_of_the_wrong_type_in_a_file_is_refused_by_name(options, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(options))
    with pytest.raises(ValueError, match=next(iter(options))):
        VilaImageProcessor.from_pretrained(tmp_path)


def test_unknown_image_mode_is_refused_by_name():
    with pytest.raises(ValueError, match="image_mode"):
        small_processor(image_mode="squeeze")(picture())


@pytest.mark.parametrize(
    "options",
    [{"image_mode": mode, "max_tiles": 11} for mode in IMAGE_MODES]
    + [{**CLIP, "image_mode": "plain"}, {"tile_multiple_images": True, "background_color": [1, 2, 3], "min_tiles": 2}],
    ids=str,
)
def test_saved_processor_is_the_same_processor(options, tmp_path):
    processor = small_processor(**options)
    processor.save_pretrained(tmp_path)
    images = transparent_pair()[0]
    for auto_class in (VilaImageProcessor, AutoImageProcessor):
        loaded = auto_class.from_pretrained(tmp_path)
        assert loaded.to_dict() == processor.to_dict()
        assert as_dict(loaded(images)) == as_dict(processor(images))
