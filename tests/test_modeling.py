"""The model alone: tower, projectors, scales, splicing, loss, and what loading and saving keeps."""

import hashlib
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import AutoModel, AutoProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer
from vila.attention_vila import default_attention
from vila.configuration_vila import VilaConfig
from vila.modeling_vila import VilaForConditionalGeneration, VilaModel
from vila.vision_vila import VilaMultiModalProjector

TILE, SIDE = 42, 3  # pixels and patches per side of a tile of `tiny_config`
SCALES = [TILE, 2 * TILE, 3 * TILE]
CHECKPOINTS = (
    "nvila_lite_image",
    "nvila_dynamic_s2_image",
    "vila15_image",
    "vila15_s2_image",
    "vila15_llama3_image",
    "vila15_clip_image",
    "vila15_intern_image",
)


def tiny_config(vision=None, text=None, **options):
    vision_config = {
        "model_type": "siglip_vision_model",
        "hidden_size": 12,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": TILE,
        "patch_size": 14,
        **(vision or {}),
    }
    if vision_config["model_type"] == "siglip_vision_model":
        vision_config.setdefault("vision_use_head", False)
    text_config = {
        "model_type": "qwen2",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        **(text or {}),
    }
    ids = {"image_token_id": 70, "video_token_id": 71}
    return VilaConfig(vision_config=vision_config, text_config=text_config, **{**ids, **options})


def randomize(module):
    """Fresh models have zero biases and unit norms, which would hide a bias or norm that is not applied."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.ndim == 1))
    return module.eval()


def tiny_model(*args, **options):
    return randomize(VilaForConditionalGeneration(tiny_config(*args, **options)))


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pixels(tiles, seed=0, side=TILE):
    return noise(tiles, 3, side, side, seed=seed)


def grids(*sizes):
    return torch.tensor([(1, rows, cols) for rows, cols in sizes])


def prompt(config, *counts):
    """One row of ids: text, and a block of placeholders for each of `counts`."""
    row = [1, 2]
    for number, count in enumerate(counts, start=3):
        row += [config.image_token_id] * count + [number]
    return torch.tensor([[*row, 9]])


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def load(folder, **options):
    return VilaForConditionalGeneration.from_pretrained(folder, **{"dtype": "float32", **options}).eval()


def encode(folder, chat, **processor_kwargs):
    return AutoProcessor.from_pretrained(folder).apply_chat_template(
        chat,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=processor_kwargs,
    )


def user(*content):
    blocks = [{"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "image": c} for c in content]
    return [{"role": "user", "content": blocks}]


def picture(color, size=(60, 60)):
    return Image.new("RGB", size, color)


@pytest.fixture(scope="module")
def lite(converted):
    """A converted checkpoint's model and inputs with two pictures."""
    folder = converted("nvila_lite_image")
    return load(folder), encode(folder, user(picture("red"), picture("blue"), "Which?"))


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


ENCODERS = {
    "plain": ({}, 12, TILE, [(2, 3), (1, 1), (2, 2)], [7, 1, 5]),
    "static": ({"s2": True, "s2_scales": SCALES}, 3, 3 * TILE, [(1, 1)] * 3, [1] * 3),
    "dynamic": ({"dynamic_s2": True, "s2_scales": SCALES}, 29, TILE, [(3, 3), (1, 1), (5, 2)], [14, 1, 15]),
}


def encoder_case(name):
    options, _, side, sizes, counts = ENCODERS[name]
    return tiny_model(**options), pixels(sum(counts), side=side), grids(*sizes), counts


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


# ---- numerics


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("attention", ["eager", {"text_config": "eager"}, {"vision_config": "eager"}, None], ids=str)
@torch.no_grad()
def test_every_attention_equals_sdpa(converted, checkpoint, attention):
    folder = converted(checkpoint)
    other, sdpa = load(folder, attn_implementation=attention), load(folder, attn_implementation="sdpa")
    default = default_attention() or "sdpa"
    chosen = {"text_config": "eager", "vision_config": "eager"} if attention == "eager" else attention or {}
    assert other.model.language_model.config._attn_implementation == chosen.get("text_config", default)
    assert other.model.vision_tower.config._attn_implementation == chosen.get("vision_config", default)
    inputs = encode(folder, user(picture("red", (90, 40)), "What is this?"))
    close(other(**inputs).logits, sdpa(**inputs).logits)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)], ids=str)
@torch.no_grad()
def test_half_precision_stays_near_float32(converted, checkpoint, dtype, tolerance):
    folder = converted(checkpoint)
    inputs = encode(folder, user(picture("red", (90, 40)), "What is this?"))
    expected, half = load(folder)(**inputs).logits, load(folder, dtype=dtype)(**inputs).logits
    assert half.dtype == dtype
    error = (half.float() - expected).norm() / expected.norm()
    assert error < tolerance


# ---- splicing


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@torch.no_grad()
def test_the_picture_changes_the_answer(converted, checkpoint):
    folder = converted(checkpoint)
    model = load(folder)
    black, white = (model(**encode(folder, user(picture(c), "What?"))).logits[0, -1] for c in ("black", "white"))
    assert (black - white).abs().max() > 1e-3


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_every_picture_lands_on_its_own_placeholders(name):
    model, tiles, sizes, _ = encoder_case(name)
    features = model.get_image_features(tiles, sizes).pooler_output
    ids = prompt(model.config, *[len(rows) for rows in features])
    embedded = model.model.embed_text(ids)
    start = 2
    for rows in features:
        embedded[0, start : start + len(rows)] = rows
        start += len(rows) + 1
    output = model(input_ids=ids, pixel_values=tiles, image_grid_thw=sizes)
    close(output.logits, model(inputs_embeds=embedded).logits)
    for returned, rows in zip(output.image_hidden_states, features):
        close(returned, rows)


@torch.no_grad()
def test_exchanging_two_pictures_changes_logits(lite):
    model, inputs = lite
    assert len(inputs["pixel_values"]) == 2
    swapped = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    assert (model(**inputs).logits - model(**swapped).logits)[0, -1].abs().max() > 1e-3


@torch.no_grad()
def test_pictures_of_a_batch_go_to_their_rows():
    model = tiny_model()
    ids = torch.cat([prompt(model.config, 4, 4), prompt(model.config, 4, 4)])
    tiles = pixels(4)
    rows = [model(input_ids=ids[:1], pixel_values=tiles[:2]), model(input_ids=ids[:1], pixel_values=tiles[2:])]
    close(model(input_ids=ids, pixel_values=tiles).logits, torch.cat([row.logits for row in rows]))


@torch.no_grad()
def test_text_only_input_does_not_run_the_tower(lite):
    model, _ = lite
    hook = model.model.vision_tower.register_forward_pre_hook(lambda *_: pytest.fail("the tower ran"))
    output = model(input_ids=torch.tensor([[1, 2, 3]]))
    hook.remove()
    assert output.image_hidden_states is None and output.logits.shape[:2] == (1, 3)


@torch.no_grad()
def test_features_computed_beforehand_replace_pixels(lite):
    model, inputs = lite
    features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    logits = model(input_ids=inputs["input_ids"], mm_encoder_outputs={"image": features}).logits
    close(logits, model(**inputs).logits)


MISUSES = {
    "too few placeholders": (lambda c: {"input_ids": prompt(c, 3)}, "3 image placeholders.* 4 features"),
    "too many placeholders": (lambda c: {"input_ids": prompt(c, 4, 4)}, "8 image placeholders.* 4 features"),
    "no placeholder": (lambda c: {"input_ids": prompt(c)}, "0 image placeholders.* 4 features"),
    "placeholders without pictures": (lambda c: {"pixel_values": None}, "4 image placeholders.* 0 features"),
    "too large a grid": (lambda c: {"image_grid_thw": grids((2, 2))}, "5 tiles.* holds 1"),
    "too many grids": (lambda c: {"image_grid_thw": grids((1, 1), (1, 1))}, "2 tiles.* holds 1"),
    "pixels and features": (
        lambda c: {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=[torch.zeros(4, 16)])}},
        "pixel_values and mm_encoder_outputs",
    ),
    "embeddings without ids": (
        lambda c: {"input_ids": None, "inputs_embeds": torch.zeros(1, 8, 16)},
        "need `input_ids`",
    ),
    "ids and embeddings": (lambda c: {"inputs_embeds": torch.zeros(1, 8, 16)}, "exactly one of"),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_is_an_error_that_says_what_is_wrong(misuse):
    model = tiny_model()
    change, message = MISUSES[misuse]
    inputs = {"input_ids": prompt(model.config, 4), "pixel_values": pixels(1), **change(model.config)}
    with pytest.raises(ValueError, match=message):
        model(**inputs)


def test_dynamic_s2_refuses_grids_that_do_not_fit_its_tiles():
    model = tiny_model(dynamic_s2=True, s2_scales=SCALES)
    with pytest.raises(ValueError, match=r"14 tiles.* holds 10"):
        model.get_image_features(pixels(10), grids((3, 3)))


# ---- loss, gradients, kept logits


def test_loss_is_next_token_cross_entropy_without_placeholders():
    model = tiny_model()
    ids = prompt(model.config, 4)
    labels = ids.clone()
    labels[0, 0] = model.config.video_token_id
    labels[0, -2] = -100
    output = model(input_ids=ids, pixel_values=pixels(1), labels=labels)
    kept = [(position, int(labels[0, position + 1])) for position in range(ids.shape[1] - 1)]
    kept = [(position, target) for position, target in kept if 0 <= target < 64]
    assert [target for _, target in kept] == [2, 9]
    losses = [-output.logits[0, position].log_softmax(-1)[target] for position, target in kept]
    close(output.loss, torch.stack(losses).mean())


def gradients(model, **inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ENCODERS)
def test_gradients_reach_all_weights_and_checkpointing_does_not_change_them(name):
    model, tiles, sizes, _ = encoder_case(name)
    model.train()
    ids = prompt(model.config, *[len(rows) for rows in model.get_image_features(tiles, sizes).pooler_output])
    inputs = {"input_ids": ids, "pixel_values": tiles, "image_grid_thw": sizes, "labels": ids}
    plain = gradients(model, **inputs)
    assert [key for key, grad in plain.items() if grad is None or not grad.abs().max() > 0] == []

    calls = {"tower": 0, "text": 0}
    blocks = {"tower": model.model.vision_tower.encoder.layers[0], "text": model.model.language_model.layers[0]}
    for part, block in blocks.items():
        block.mlp.register_forward_pre_hook(lambda *_, part=part: calls.update({part: calls[part] + 1}))
    gradients(model, **inputs)
    once = dict(calls)
    model.activation_checkpointing_enable()
    checkpointed = gradients(model, **inputs)
    assert calls == {part: 3 * count for part, count in once.items()}, "every layer must run a second time"
    for key, grad in plain.items():
        close(checkpointed[key], grad)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4])], ids=str)
@torch.no_grad()
def test_kept_logits_are_those_of_the_positions_asked_for(keep):
    model = tiny_model()
    inputs = {"input_ids": prompt(model.config, 4), "pixel_values": pixels(1)}
    everything = model(**inputs).logits
    expected = everything[:, -keep:] if isinstance(keep, int) else everything[:, keep]
    close(model(**inputs, logits_to_keep=keep).logits, expected)


def test_outputs_come_as_a_tuple_where_asked_for():
    model = tiny_model()
    inputs = {"input_ids": prompt(model.config, 4), "pixel_values": pixels(1)}
    assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).logits)
    (features,) = model.get_image_features(pixels(1), return_dict=False)
    close(features[0], model.get_image_features(pixels(1)).pooler_output[0])


# ---- loading and saving


def checksum(model):
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode() + weight.numpy().tobytes())
    return digest.hexdigest()


def without_name(config):
    return {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}


def loaded_cleanly(model_class, folder):
    model, info = model_class.from_pretrained(folder, dtype="float32", output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()


@pytest.mark.parametrize("original_format", [True, False])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_saving_and_loading_keeps_every_weight(converted, checkpoint, original_format, tmp_path):
    model = loaded_cleanly(VilaForConditionalGeneration, converted(checkpoint))
    model.save_pretrained(tmp_path, save_original_format=original_format)
    again = loaded_cleanly(VilaForConditionalGeneration, tmp_path)
    assert checksum(again) == checksum(model)
    assert without_name(again.config) == without_name(model.config)
    assert again.generation_config.to_dict() == model.generation_config.to_dict()


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_loading_is_deterministic_and_silent(converted, checkpoint, caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        first, second = (checksum(load(converted(checkpoint))) for _ in range(2))
    finally:
        logger.removeHandler(caplog.handler)
    assert first == second
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("original_format", [None, True, False])
@torch.no_grad()
def test_model_without_head_loads_from_the_same_folder(converted, original_format, tmp_path):
    folder = converted("nvila_lite_image")
    whole = load(folder)
    if original_format is not None:
        whole.save_pretrained(tmp_path, save_original_format=original_format)
        folder = tmp_path
    headless, info = VilaModel.from_pretrained(folder, dtype="float32", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert checksum(headless) == checksum(whole.model)


@torch.no_grad()
def test_tied_head_shares_the_embeddings_and_survives_saving(tmp_path):
    model = tiny_model(text={"tie_word_embeddings": True})
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = loaded_cleanly(VilaForConditionalGeneration, tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert checksum(again) == checksum(model)


def test_head_is_its_own_weight_where_it_is_not_tied():
    model = tiny_model()
    assert model.lm_head.weight is not model.get_input_embeddings().weight


@pytest.mark.parametrize("rows", [60, 72, 80])
@torch.no_grad()
def test_resized_embeddings_keep_the_answers(rows, tmp_path):
    model = tiny_model()
    inputs = {"input_ids": prompt(model.config, 4), "pixel_values": pixels(1)}
    before = model(**inputs).logits
    model.resize_token_embeddings(rows, mean_resizing=False)
    assert model.get_input_embeddings().num_embeddings == model.config.text_config.vocab_size == rows
    after = model(**inputs, labels=inputs["input_ids"])
    assert after.logits.shape[-1] == rows and after.loss.isfinite()
    shared = min(rows, 64)
    close(after.logits[..., :shared], before[..., :shared])
    model.save_pretrained(tmp_path)
    assert checksum(loaded_cleanly(VilaForConditionalGeneration, tmp_path)) == checksum(model)


@pytest.mark.parametrize("checkpoint", ["nvila_lite_image", "nvila_dynamic_s2_image", "vila15_s2_image"])
@pytest.mark.parametrize("max_memory", [None, {"cpu": "200KB"}], ids=["cpu", "disk"])
@torch.no_grad()
def test_placement_by_accelerate_does_not_change_the_answer(converted, checkpoint, max_memory, tmp_path):
    folder = converted(checkpoint)
    inputs = encode(folder, user(picture("red", (90, 40)), "What is this?"))
    expected = load(folder)
    placed = load(folder, device_map="auto", max_memory=max_memory, offload_folder=tmp_path)
    assert set(getattr(placed, "hf_device_map", {"": "cpu"}).values()) == ({"cpu", "disk"} if max_memory else {"cpu"})
    close(placed(**inputs).logits, expected(**inputs).logits)
    options = {**inputs, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(placed.generate(**options), expected.generate(**options))


def test_parts_are_found_where_engines_look_for_them():
    model = tiny_model()
    assert isinstance(model.get_output_embeddings(), nn.Linear)
    assert model.get_input_embeddings() is model.model.language_model.embed_tokens
    assert model.get_decoder() is model.model.language_model
    assert model.base_model is model.model


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_base_model_alone_loads_without_a_rest(converted, checkpoint):
    _, info = VilaModel.from_pretrained(converted(checkpoint), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_layers_behind_the_selected_one_are_never_built(monkeypatch):
    built, build = [], SiglipEncoderLayer.__init__

    def spy(layer, config):
        built.append(layer)
        build(layer, config)

    monkeypatch.setattr(SiglipEncoderLayer, "__init__", spy)
    model = tiny_model()
    assert len(built) == model.config.num_vision_layers == model.config.vision_config.num_hidden_layers - 1
