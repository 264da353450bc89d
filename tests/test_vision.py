"""The tower alone, its projectors and scales: equal to plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    ENCODERS,
    SCALES,
    SIDE,
    TILE,
    close,
    encoder_case,
    grids,
    noise,
    pixels,
    randomize,
    tiny_config,
    tiny_model,
)
from torch import nn
from transformers import AutoModel
from vila.modeling_vila import VilaForConditionalGeneration, VilaModel
from vila.vision_vila import VilaMultiModalProjector

# ---- tower


INTERN_OPTIONS = {"norm_type": "rms_norm", "use_qk_norm": True, "image_size": [TILE, TILE], "patch_size": [14, 14]}
TOWERS = {"siglip_vision_model": {}, "clip_vision_model": {}, "internvl_vision": INTERN_OPTIONS}


def hidden_states(tower, pixel_values):
    """Input of the first block and output of every block, as the blocks themselves see them."""
    blocks, states = next(m for m in tower.encoder.children() if isinstance(m, nn.ModuleList)), []
    hooks = [blocks[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))]
    hooks += [
        block.register_forward_hook(lambda _, args, out: states.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks
    ]
    tower(pixel_values=pixel_values)
    for hook in hooks:
        hook.remove()
    return states


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize(("layer", "kept"), [(-2, 2), (-1, 3), (0, 0), (1, 1), (3, 3), (-4, 0)])
def test_tower_holds_the_used_layers_only_and_returns_the_selected_hidden_state(tower, layer, kept):
    vision = {"model_type": tower, **TOWERS[tower]}
    config = tiny_config(vision, vision_feature_layer=layer, projector_type="linear")
    full = randomize(AutoModel.from_config(config.vision_config))
    pruned = VilaModel(config).vision_tower.eval()
    assert not pruned.load_state_dict(full.state_dict(), strict=False).missing_keys
    names = set(pruned.state_dict())
    assert len({name.split(".")[2] for name in names if name.startswith("encoder.layer")}) == kept
    assert not any(name.startswith(("post_layernorm", "layernorm", "head")) for name in names)

    selected = pruned(pixel_values=pixels(2)).last_hidden_state
    close(selected, hidden_states(full, pixels(2))[layer])
    if layer not in (-1, 3):  # where transformers gives the final norm's output, the original gives its input
        close(selected, full(pixel_values=pixels(2), output_hidden_states=True).hidden_states[layer])


def test_siglip_head_is_not_built_where_the_config_asks_for_one():
    tower = VilaModel(tiny_config({"vision_use_head": True})).vision_tower
    assert not any("head" in key for key in tower.state_dict())
    assert tower(pixel_values=pixels(1)).last_hidden_state.shape == (1, SIDE**2, 12)


@pytest.mark.parametrize(("strategy", "tokens"), [("default", SIDE**2), ("full", SIDE**2 + 1)])
def test_class_token_is_dropped_by_the_default_strategy_only(strategy, tokens):
    options = {"vision_feature_select_strategy": strategy, "projector_type": "linear"}
    model = randomize(VilaModel(tiny_config({"model_type": "clip_vision_model"}, **options)))
    hidden = hidden_states(model.vision_tower, pixels(1))[-1][0, -tokens:]
    assert model.config.num_tile_tokens == tokens
    close(model.get_image_features(pixels(1)).pooler_output[0], model.multi_modal_projector(hidden))


# ---- projectors

# index in the state dict -> shape of the weight, for 12 channels and 16 hidden (specs of the original's projectors)
PROJECTORS = {
    "identity": {},
    "linear": {"": (16, 12)},
    "mlp1x_gelu": {"0": (16, 12)},
    "mlp2x_gelu": {"0": (16, 12), "2": (16, 16)},
    "mlp3x_gelu": {"0": (16, 12), "2": (16, 16), "4": (16, 16)},
    "mlp_downsample": {"1": (48,), "2": (16, 48), "4": (16, 16)},
    "mlp_downsample_2x2_fix": {"1": (48,), "2": (16, 48), "4": (16, 16)},
    "mlp_downsample_3x3_fix": {"1": (108,), "2": (36, 108), "4": (36,), "5": (16, 36), "7": (16, 16)},
    "mlp_downsample_3x3_s2": {
        **{"1": (108,), "2": (36, 108), "4": (36,), "5": (12, 36), "7": (12,), "8": (4, 12)},
        **{"10": (4,), "11": (16, 4), "13": (16, 16)},
    },
    "mlp_downsample_3x3_s2_new": {
        **{"1": (108,), "2": (48, 108), "4": (48,), "5": (24, 48), "7": (24,), "8": (12, 24)},
        **{"10": (12,), "11": (4, 12), "13": (4,), "14": (16, 4), "16": (16, 16)},
    },
}


def naive_space_to_channel(tokens, factor):
    """`(L, D) -> (T, factor*factor*D)`, cell by cell; zeros outside of the map."""
    side, channels = math.isqrt(len(tokens)), tokens.shape[1]
    cells = []
    for row in range(0, side, factor):
        for col in range(0, side, factor):
            cell = []
            for r in range(row, row + factor):
                for c in range(col, col + factor):
                    cell.append(tokens[r * side + c] if r < side and c < side else torch.zeros(channels))
            cells.append(torch.cat(cell))
    return torch.stack(cells)


def naive_project(projector, kind, tokens):
    """What the weights of a projector make of one tile, `(L, D) -> (T, H)`."""
    if kind == "identity":
        return tokens
    weights = projector.state_dict()
    if kind == "linear":
        return F.linear(tokens, weights["layers.weight"], weights["layers.bias"])
    if "downsample" in kind:
        tokens = naive_space_to_channel(tokens, 3 if "3x3" in kind else 2)
    indices = sorted({int(name.split(".")[1]) for name in weights})
    for index in indices:
        weight, bias = weights[f"layers.{index}.weight"], weights[f"layers.{index}.bias"]
        if weight.ndim == 1:
            tokens = F.layer_norm(tokens, weight.shape, weight, bias, eps=1e-5)
        else:
            tokens = F.linear(tokens, weight, bias)
            if index != indices[-1]:
                tokens = 0.5 * tokens * (1 + torch.erf(tokens / math.sqrt(2)))
    return tokens


@pytest.mark.parametrize("kind", PROJECTORS)
def test_projector_has_the_layers_of_the_original_at_its_indices(kind):
    weights = VilaMultiModalProjector(tiny_config(projector_type=kind)).state_dict()
    shapes = {f"layers.{index}.".replace("..", "."): shape for index, shape in PROJECTORS[kind].items()}
    expected = {f"{name}weight": shape for name, shape in shapes.items()}
    expected |= {f"{name}bias": shape[:1] for name, shape in shapes.items()}
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == expected


@pytest.mark.parametrize("kind", PROJECTORS)
@pytest.mark.parametrize("side", [3, 4, 5, 6])
def test_projector_equals_a_naive_loop(kind, side):
    projector = randomize(VilaMultiModalProjector(tiny_config(projector_type=kind)))
    features = noise(2, side**2, 12)
    expected = torch.stack([naive_project(projector, kind, tile) for tile in features])
    close(projector(features), expected)


@pytest.mark.parametrize("kind", [kind for kind in PROJECTORS if kind != "identity"])
@pytest.mark.parametrize("image_size", [42, 56, 70])
def test_features_are_as_many_as_the_config_says(kind, image_size):
    model = VilaModel(tiny_config({"image_size": image_size}, projector_type=kind))
    features = model.get_image_features(pixels(2, side=image_size)).pooler_output
    assert [tuple(rows.shape) for rows in features] == [(model.config.num_tile_tokens, 16)] * 2


# ---- S2


def naive_merge(maps, rows, cols):
    """Square token maps in row-major order -> `(rows*S, cols*S, D)`."""
    side = math.isqrt(maps.shape[1])
    merged = torch.zeros(rows * side, cols * side, maps.shape[2])
    for number, tokens in enumerate(maps):
        for patch, token in enumerate(tokens):
            merged[number // cols * side + patch // side, number % cols * side + patch % side] = token
    return merged


def naive_area_resize(features, height, width):
    """Every output cell is the mean of the input cells that it touches."""
    old_height, old_width, _ = features.shape
    resized = torch.zeros(height, width, features.shape[2])
    for row in range(height):
        for col in range(width):
            top, bottom = row * old_height // height, -(-(row + 1) * old_height // height)
            left, right = col * old_width // width, -(-(col + 1) * old_width // width)
            resized[row, col] = features[top:bottom, left:right].mean((0, 1))
    return resized


def naive_concat(maps, output_scale):
    height, width, _ = maps[output_scale].shape
    return torch.cat([naive_area_resize(features, height, width) for features in maps], dim=-1)


def naive_static_s2(model, image):
    config, maps = model.config, []
    for scale in config.s2_scales:
        scaled = F.interpolate(image[None], size=(scale, scale), mode="bicubic", align_corners=False)[0]
        count = scale // TILE
        crops = [
            scaled[:, r * TILE : (r + 1) * TILE, c * TILE : (c + 1) * TILE] for r in range(count) for c in range(count)
        ]
        tokens = [model.vision_tower(pixel_values=crop[None]).last_hidden_state[0] for crop in crops]
        maps.append(naive_merge(torch.stack(tokens), count, count))
    merged = naive_concat(maps, config.s2_resize_output_to_scale_idx)
    return naive_project(model.multi_modal_projector, config.projector_type, merged.flatten(0, 1))


def naive_dynamic_s2(model, tiles, rows, cols):
    """One picture of dynamic S2: its tiles `(N, 3, H, W)`, smaller scales first -> `(tokens, hidden)`."""
    config = model.config
    tokens = torch.stack([model.vision_tower(pixel_values=tile[None]).last_hidden_state[0] for tile in tiles])
    if (rows, cols) == (1, 1):
        merged = torch.cat([naive_merge(tokens, 1, 1)] * len(config.s2_scales), dim=-1)
        block_rows, block_cols = 1, 1
    else:
        splits = [(scale // TILE, scale // TILE) for scale in config.s2_scales[:-1]] + [(rows, cols)]
        maps, start = [], 0
        for split_rows, split_cols in splits:
            end = start + split_rows * split_cols
            maps.append(naive_merge(tokens[start:end], split_rows, split_cols))
            start = end
        assert start == len(tokens)
        merged = naive_concat(maps, config.s2_resize_output_to_scale_idx)
        block_rows, block_cols = splits[config.s2_resize_output_to_scale_idx]
    side = merged.shape[0] // block_rows
    projected = []
    for row in range(block_rows):
        for col in range(block_cols):
            block = merged[row * side : (row + 1) * side, col * side : (col + 1) * side]
            projected.append(naive_project(model.multi_modal_projector, config.projector_type, block.flatten(0, 1)))
    return naive_merge(torch.stack(projected), block_rows, block_cols).flatten(0, 1)


@pytest.mark.parametrize(("scales", "output_scale"), [((42, 84), 0), ((42, 84), 1), ((42, 126), -1), (SCALES, 1)])
@torch.no_grad()
def test_static_s2_equals_a_naive_reference(scales, output_scale):
    model = tiny_model(s2=True, s2_scales=scales, s2_resize_output_to_scale_idx=output_scale).model
    pictures = pixels(2, side=max(scales))
    features = model.get_image_features(pictures, grids((1, 1), (1, 1))).pooler_output
    assert len(features) == 2 and len(features[0]) == model.config.num_tile_tokens
    for rows, image in zip(features, pictures):
        close(rows, naive_static_s2(model, image))


@torch.no_grad()
def test_static_s2_splits_no_more_than_the_max_split_size_asks_for():
    options = {"s2": True, "s2_scales": [TILE], "s2_resize_output_to_scale_idx": 0, "projector_type": "mlp_downsample"}
    model = tiny_model(s2_max_split_size=TILE, **options).model
    plain = randomize(VilaForConditionalGeneration(tiny_config())).model
    close(model.get_image_features(pixels(2)).pooler_output[1], plain.get_image_features(pixels(2)).pooler_output[1])


DYNAMIC_GRIDS = [[(1, 1)], [(2, 5)], [(3, 3)], [(4, 3), (1, 1), (2, 6), (1, 1), (9, 1)]]


@pytest.mark.parametrize("sizes", DYNAMIC_GRIDS, ids=str)
@pytest.mark.parametrize("output_scale", [0, 1, 2, -1, -2])
@torch.no_grad()
def test_dynamic_s2_equals_a_naive_reference(sizes, output_scale):
    model = tiny_model(dynamic_s2=True, s2_scales=SCALES, s2_resize_output_to_scale_idx=output_scale).model
    counts = [1 if size == (1, 1) else 1 + 4 + size[0] * size[1] for size in sizes]
    tiles = pixels(sum(counts))
    features = model.get_image_features(tiles, grids(*sizes)).pooler_output
    assert len(features) == len(sizes)
    for rows, own_tiles, size in zip(features, tiles.split(counts), sizes):
        close(rows, naive_dynamic_s2(model, own_tiles, *size))


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_chunk_size_of_the_tower_does_not_change_features(name):
    model, tiles, sizes, _ = encoder_case(name)
    seen = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    reference = torch.cat(model.get_image_features(tiles, sizes).pooler_output)
    for chunk_size in (1, 2, 5, 1000):
        model.config.vision_chunk_size = chunk_size
        seen.clear()
        close(torch.cat(model.get_image_features(tiles, sizes).pooler_output), reference)
        assert max(seen) <= chunk_size


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_a_picture_has_the_same_features_alone_and_among_others(name):
    model, tiles, sizes, counts = encoder_case(name)
    together = model.get_image_features(tiles, sizes).pooler_output
    assert len(together) == len(counts)
    for rows, own_tiles, size in zip(together, tiles.split(counts), sizes):
        close(model.get_image_features(own_tiles, size[None]).pooler_output[0], rows)
