"""Grids, crops and counts: the original's 1734 tile choices, and counts against what is really cut and projected."""

import json
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import GOLDENS
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vila import VilaConfig, VilaImageProcessor, VilaModel
from vila.configuration_vila import DOWNSAMPLE_FACTORS
from vila.geometry_vila import (
    MAX_TILES,
    TileGrid,
    choose_tile_grid,
    crops_per_side,
    downsampled_side,
    min_dynamic_s2_tiles,
    num_image_tokens,
    num_tile_tokens,
    num_tiles,
    output_blocks,
    patches_per_side,
    pooled_frames,
    scale_splits,
    square_padding,
    tile_boxes,
    tile_grid_candidates,
)
from vila.vision_vila import VilaMultiModalProjector

# no deadline: other work on the machine must not fail a test
settings.register_profile("geometry", deadline=None, database=None)
settings.load_profile("geometry")

GOLDEN = json.loads((GOLDENS / "vila" / "tiling" / "golden.json").read_text())
CASES = GOLDEN["cases"]
SCALES = [8, 16, 24]
NUM_SCALES = len(SCALES)

sides = st.integers(1, 3000)
bounds = st.tuples(st.integers(1, 12), st.integers(0, 12)).map(lambda pair: (pair[0], sum(pair)))


@pytest.mark.parametrize("limits", GOLDEN["candidate_order"])
def test_candidates_have_the_order_of_the_original(limits):
    min_tiles, max_tiles = map(int, limits.split(","))
    order = [[grid.cols, grid.rows] for grid in tile_grid_candidates(min_tiles, max_tiles)]
    assert order == GOLDEN["candidate_order"][limits]


@given(bounds)
def test_candidates_are_all_grids_within_the_limits_once_each(limits):
    min_tiles, max_tiles = limits
    candidates = tile_grid_candidates(min_tiles, max_tiles)
    every = {(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles + 1)}
    assert set(candidates) == {(r, c) for r, c in every if min_tiles <= r * c <= max_tiles}
    assert len(candidates) == len(set(candidates))
    assert [grid.area for grid in candidates] == sorted(grid.area for grid in candidates)


def test_golden_has_all_choices():
    assert len(CASES) == 1734


@pytest.mark.parametrize("mode", sorted({case["mode"] for case in CASES}))
def test_grid_and_number_of_tiles_equal_the_original(mode):
    for case in (case for case in CASES if case["mode"] == mode):
        scales = case.get("s2_scales")
        min_tiles = case["min_tiles"] if scales is None else min_dynamic_s2_tiles(scales)
        grid = choose_tile_grid(case["width"], case["height"], case["tile"], min_tiles, case["max_tiles"])
        assert (grid.cols, grid.rows) == (case["cols"], case["rows"]), case
        assert num_tiles(grid, scales) == case["num_pixel_tiles"], case


@given(sides, sides, st.integers(1, 1344), bounds)
def test_no_candidate_has_a_nearer_aspect_ratio_than_the_chosen_one(width, height, tile_size, limits):
    chosen = choose_tile_grid(width, height, tile_size, *limits)
    candidates = tile_grid_candidates(*limits)
    assert chosen in candidates

    def distance(grid):
        return abs(Fraction(width, height) - Fraction(grid.cols, grid.rows))

    # exact arithmetic may see a difference where the original's floats see a tie
    assert distance(chosen) <= min(map(distance, candidates)) + Fraction(1, 10**9)


@given(sides, st.integers(1, 1344), bounds)
def test_among_equally_near_grids_a_larger_one_needs_half_of_its_pixels(side, tile_size, limits):
    chosen = choose_tile_grid(side, side, tile_size, *limits)
    first = next((grid for grid in tile_grid_candidates(*limits) if grid.rows == grid.cols), None)
    if first is not None:
        assert chosen == first or side * side > 0.5 * tile_size**2 * chosen.area


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 20))
def test_boxes_cover_the_resized_picture_exactly_once_row_by_row(rows, cols, side):
    covered = np.zeros((rows * side, cols * side), dtype=int)
    boxes = tile_boxes(TileGrid(rows, cols), side)
    for box in boxes:
        covered[box.upper : box.lower, box.left : box.right] += 1
        assert (box.right - box.left, box.lower - box.upper) == (side, side)
    assert (covered == 1).all()
    assert boxes == sorted(boxes, key=lambda box: (box.upper, box.left))


@given(sides, sides)
def test_square_holds_the_picture_in_its_middle(width, height):
    side, left, upper = square_padding(width, height)
    assert side == max(width, height)
    assert 0 <= side - width - 2 * left <= 1
    assert 0 <= side - height - 2 * upper <= 1


@settings(max_examples=50)
@given(st.integers(1, 60), st.integers(1, 60), bounds, st.sampled_from([None, [4, 8], [4, 8, 12]]))
def test_number_of_tiles_is_that_of_the_tiles_really_cut(width, height, limits, scales):
    min_tiles, max_tiles = limits
    processor = VilaImageProcessor(
        size={"height": 4, "width": 4},
        image_mode="dynamic" if scales is None else "dynamic_s2",
        min_tiles=min_tiles,
        max_tiles=max_tiles if scales is None else max_tiles + 9,
        s2_scales=scales,
    )
    data = processor(Image.new("RGB", (width, height)))
    grid = TileGrid(*data["image_grid_thw"][0][1:])
    assert len(data["pixel_values"]) == num_tiles(grid, scales)
    assert [grid] == processor.tile_grids([(height, width)])
    untiled = processor([Image.new("RGB", (width, height))] * 2)
    assert len(untiled["pixel_values"]) == 2 * num_tiles(TileGrid(1, 1), scales)


def tiny_config(image_size=8, patch_size=4, tower="siglip_vision_model", **options):
    """Towers and language model of a few hundred weights."""
    vision_config = {
        "model_type": tower,
        "hidden_size": 12,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": patch_size,
    }
    text_config = {
        "model_type": "qwen2",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 16,
    }
    return VilaConfig(vision_config=vision_config, text_config=text_config, vision_feature_layer=-1, **options)


def feature_rows(config, grids):
    """Feature rows of each picture as the model really makes them."""
    torch.manual_seed(0)
    scales = config.dynamic_scales
    size = config.s2_scales[-1] if config.s2 else config.vision_config.image_size
    pixel_values = torch.rand(sum(num_tiles(grid, scales) for grid in grids), 3, size, size)
    grid_thw = torch.tensor([(1, *grid) for grid in grids])
    with torch.no_grad():
        return [len(rows) for rows in VilaModel(config).get_image_features(pixel_values, grid_thw).pooler_output]


@pytest.mark.parametrize("side", range(1, 8))
@pytest.mark.parametrize("projector_type", ["identity", "linear", "mlp2x_gelu", *DOWNSAMPLE_FACTORS])
def test_tile_tokens_equal_what_the_projector_gives(projector_type, side):
    # three pixels beyond the last whole patch must not count
    config = tiny_config(image_size=4 * side + 3, projector_type=projector_type)
    projected = VilaMultiModalProjector(config)(torch.rand(2, side * side, config.feature_size))
    assert projected.shape[1] == config.num_tile_tokens


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_class_token_counts_where_it_is_kept(strategy):
    config = tiny_config(
        tower="clip_vision_model", projector_type="mlp2x_gelu", vision_feature_select_strategy=strategy
    )
    assert feature_rows(config, [TileGrid(1, 1)]) == [config.num_tile_tokens] == [4 + (strategy == "full")]


@pytest.mark.parametrize("projector_type", ["linear", "mlp_downsample", "mlp_downsample_3x3_fix"])
def test_image_tokens_equal_what_the_model_gives(projector_type):
    config = tiny_config(image_size=14, projector_type=projector_type)
    grids = [TileGrid(1, 1), TileGrid(2, 3), TileGrid(5, 1)]
    assert feature_rows(config, grids) == [num_image_tokens(grid, config.num_tile_tokens) for grid in grids]


pool_sizes = st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=1, max_size=3)


@given(st.integers(1, 200), st.integers(1, 16), st.none() | pool_sizes)
def test_pooled_frames_are_the_groups_that_cover_all_frames_and_cells(frames, side, pools):
    def groups(length, size):
        return len({index // size for index in range(length)})

    expected = [(groups(frames, t), groups(side, rows) * groups(side, cols)) for t, rows, cols in pools or [(1, 1, 1)]]
    assert pooled_frames(frames, side, pools) == expected


@pytest.mark.parametrize("output_scale", range(-NUM_SCALES, NUM_SCALES))
@pytest.mark.parametrize("max_split_size", [None, 8])
def test_static_s2_tokens_equal_what_the_model_gives(max_split_size, output_scale):
    config = tiny_config(
        s2=True, s2_scales=SCALES, s2_max_split_size=max_split_size, s2_resize_output_to_scale_idx=output_scale
    )
    grids = [TileGrid(1, 1), TileGrid(1, 1)]
    assert feature_rows(config, grids) == [num_image_tokens(grid, config.num_tile_tokens) for grid in grids]


@pytest.mark.parametrize("output_scale", range(-NUM_SCALES, NUM_SCALES))
@pytest.mark.parametrize("projector_type", ["linear", "mlp_downsample", "mlp_downsample_3x3_fix"])
def test_dynamic_s2_tokens_equal_what_the_model_gives(projector_type, output_scale):
    config = tiny_config(
        dynamic_s2=True,
        s2_scales=SCALES,
        s2_resize_output_to_scale_idx=output_scale,
        projector_type=projector_type,
    )
    grids = [TileGrid(1, 1), TileGrid(3, 3), TileGrid(2, 5), TileGrid(11, 1)]
    counted = [num_image_tokens(grid, config.num_tile_tokens, SCALES, output_scale) for grid in grids]
    assert feature_rows(config, grids) == counted


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_crops_of_static_s2_are_the_fewest_within_the_split_size(scale, max_split_size):
    crops = crops_per_side(scale, max_split_size)
    assert crops * max_split_size >= scale > (crops - 1) * max_split_size


@given(st.integers(1, 200), st.integers(1, 5))
def test_downsampled_side_is_the_fewest_cells_that_cover_the_map(side, factor):
    assert downsampled_side(side, factor) * factor >= side > (downsampled_side(side, factor) - 1) * factor


@pytest.mark.parametrize("tiles", [1, 12, MAX_TILES])
def test_largest_tile_limits_are_listed(tiles):
    assert {grid.area for grid in tile_grid_candidates(1, tiles)} == set(range(1, tiles + 1))


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (tile_grid_candidates, (0, 12), "min_tiles"),
        (tile_grid_candidates, (5, 4), "max_tiles"),
        (tile_grid_candidates, (1, MAX_TILES + 1), "max_tiles"),
        (choose_tile_grid, (0, 5, 448, 1, 12), "width"),
        (choose_tile_grid, (5, -1, 448, 1, 12), "height"),
        (choose_tile_grid, (5, 5, 0, 1, 12), "tile_size"),
        (choose_tile_grid, (5, 5, 448, 3, 2), "min_tiles"),
        (scale_splits, ([],), "s2_scales"),
        (scale_splits, ([0, 448],), "s2_scales"),
        (scale_splits, ([896, 448],), "s2_scales"),
        (scale_splits, ([448, 448],), "s2_scales"),
        (min_dynamic_s2_tiles, ([],), "s2_scales"),
        (num_tiles, (TileGrid(3, 3), [896, 448]), "s2_scales"),
        (output_blocks, (TileGrid(3, 3), SCALES, 3), "output_scale"),
        (output_blocks, (TileGrid(3, 3), SCALES, -4), "output_scale"),
        (num_image_tokens, (TileGrid(3, 3), 4, SCALES, 5), "output_scale"),
        (crops_per_side, (448, 0), "max_split_size"),
        (crops_per_side, (0, 448), "scale"),
        (patches_per_side, (448, 0), "patch_size"),
        (patches_per_side, (-448, 14), "image_size"),
        (downsampled_side, (4, 0), "factor"),
        (num_tile_tokens, (4, 0), "downsample"),
        (num_tile_tokens, (4, 2, 1), "class token"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_bad_argument_raises_value_error_that_names_it(function, arguments, name):
    with pytest.raises(ValueError, match=re.escape(name)):
        function(*arguments)


@pytest.mark.parametrize(
    ("image_size", "patch_size", "downsample", "class_tokens", "tokens"),
    [(384, 14, 2, 0, 196), (448, 14, 2, 0, 256), (448, 14, 3, 0, 121), (336, 14, 1, 0, 576), (336, 14, 1, 1, 577)],
)
def test_released_towers_give_their_known_number_of_tokens(image_size, patch_size, downsample, class_tokens, tokens):
    assert num_tile_tokens(patches_per_side(image_size, patch_size), downsample, class_tokens) == tokens
