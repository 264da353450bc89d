"""The model alone: numerics, splicing, loss, gradients."""

import pytest
import torch
from chat_requests import encode, user
from tiny_models import (
    CHECKPOINTS,
    ENCODERS,
    SCALES,
    close,
    encoder_case,
    grids,
    load,
    picture,
    pixels,
    prompt,
    tiny_model,
)
from transformers import AutoProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from vila.attention_vila import default_attention
from vila.modeling_vila import head_logits


@pytest.fixture(scope="module")
def lite(converted):
    """A converted checkpoint's model and inputs with two pictures."""
    folder = converted("nvila_lite_image")
    processor = AutoProcessor.from_pretrained(folder)
    return load(folder), encode(processor, [user(picture("red"), picture("blue"), "Which?")])


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
    inputs = encode(AutoProcessor.from_pretrained(folder), [user(picture("red", (90, 40)), "What is this?")])
    close(other(**inputs).logits, sdpa(**inputs).logits)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)], ids=str)
@torch.no_grad()
def test_half_precision_stays_near_float32(converted, checkpoint, dtype, tolerance):
    folder = converted(checkpoint)
    inputs = encode(AutoProcessor.from_pretrained(folder), [user(picture("red", (90, 40)), "What is this?")])
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
    processor = AutoProcessor.from_pretrained(folder)
    black, white = (model(**encode(processor, [user(picture(c), "What?")])).logits[0, -1] for c in ("black", "white"))
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


@pytest.mark.parametrize("shape", [(1, 1, 64), (1, 64), (64,), (2, 1, 64), (1, 3, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_head_reads_one_row_as_it_reads_several(shape, dtype):
    torch.manual_seed(0)
    head, seen = torch.nn.Linear(64, 40, bias=False, dtype=dtype), []
    head.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].numel() // 64))
    hidden = torch.randn(shape, dtype=dtype)
    with torch.no_grad():
        found = head_logits(head, hidden)
    exact = hidden.float() @ head.weight.float().t()
    assert found.shape == (*shape[:-1], 40) and found.dtype == dtype
    torch.testing.assert_close(found.float(), exact, atol=0.02 if dtype == torch.bfloat16 else 1e-5, rtol=0)
    rows = hidden.numel() // 64
    assert seen == [2 if rows == 1 and dtype == torch.bfloat16 else rows]
    learned = hidden.clone().requires_grad_(True)
    head_logits(head, learned).sum().backward()
    torch.testing.assert_close(learned.grad, head.weight.sum(0).expand(shape), atol=1e-2, rtol=1e-2)
