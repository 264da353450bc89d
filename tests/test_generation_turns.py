"""`generate()`: chats over several turns with one cache equal those without any."""

from functools import lru_cache

import pytest
import torch
from chat_requests import assert_same, said, user
from generation_requests import (
    CONTINUATIONS,
    NEW_TOKENS,
    ONE,
    RED,
    TALL,
    TEXT,
    TILING,
    WIDE,
    Loaded,
    answer,
    dynamic_cache,
    static_cache,
)


@pytest.fixture(scope="module")
def loaded(converted):
    """`loaded(checkpoint)`, each loaded once for all tests of this file."""
    return lru_cache(maxsize=None)(lambda checkpoint: Loaded(converted(checkpoint)))


CACHES = {"dynamic": dynamic_cache, "static": static_cache}


@pytest.mark.parametrize("checkpoint", TILING)
@pytest.mark.parametrize("chat", CONTINUATIONS)
@pytest.mark.parametrize("cache_kind", CACHES)
def test_a_continued_chat_equals_one_without_cache(loaded, checkpoint, chat, cache_kind):
    case = loaded(checkpoint)
    first, second = CONTINUATIONS[chat]
    cache = CACHES[cache_kind](case)
    history = answer(case, case.encode(first), "It is blue", cache)

    whole = case.encode([*first, said("It is blue"), *second])
    assert whole["input_ids"][0, : history.shape[1]].tolist() == history[0].tolist()
    case.tiles.clear()
    continued = case.logits(whole, past_key_values=cache)
    encoded = sum(case.tiles)
    assert_same(continued, case.logits(whole, use_cache=False))
    assert encoded == len(case.encode(second).get("pixel_values", []))


@pytest.mark.parametrize("checkpoint", TILING)
def test_a_continued_chat_may_be_given_as_its_new_turn_alone(loaded, checkpoint):
    """The ids of the new turn with the mask of the whole chat, as `GenerationMixin` accepts them."""
    case = loaded(checkpoint)
    first, second = CONTINUATIONS["first picture late"]
    cache = dynamic_cache(case)
    answer(case, case.encode(first), "It is blue", cache)
    whole = case.encode([*first, said("It is blue"), *second])
    new_turn = {**whole, "input_ids": whole["input_ids"][:, cache.get_seq_length() :]}
    assert (new_turn["input_ids"][:, : cache.get_seq_length()] == case.model.config.image_token_id).any()
    assert_same(case.logits(new_turn, past_key_values=cache), case.logits(whole))


@pytest.mark.parametrize("checkpoint", TILING)
def test_a_chat_goes_on_for_several_turns(loaded, checkpoint):
    case, chat = loaded(checkpoint), []
    cache = dynamic_cache(case)
    for turn in (user(WIDE, "What?"), user("Why?"), user(RED, TALL, "And these?")):
        chat.append(turn)
        answer(case, case.encode(chat), "It is blue", cache)
        chat.append(said("It is blue"))
    whole = case.encode([*chat, user(TALL, "The last one?")])
    assert_same(case.logits(whole, past_key_values=cache), case.logits(whole))


@pytest.mark.parametrize("checkpoint", TILING)
def test_a_continued_chat_can_be_prefilled_in_chunks(loaded, checkpoint):
    case = loaded(checkpoint)
    first, second = CONTINUATIONS["new tiled picture"]
    cache = dynamic_cache(case)
    answer(case, case.encode(first), "It is blue", cache)
    whole = case.encode([*first, said("It is blue"), *second])
    assert_same(case.logits(whole, past_key_values=cache, prefill_chunk_size=6), case.logits(whole))


@pytest.mark.parametrize("checkpoint", TILING)
@pytest.mark.parametrize("second", [(TALL, RED), (None, WIDE), (None, None)], ids=["both", "one row", "no row"])
def test_a_batch_of_chats_continues_with_new_pictures(loaded, checkpoint, second):
    """Rows of different length stay aligned with the cache because the new ids are appended to the old ones."""
    case = loaded(checkpoint)
    first = [[user(WIDE, "What is this?")], [user(RED, TALL, "What?")]]
    cache = dynamic_cache(case)
    inputs = case.encode(first)
    history = case.run(inputs, past_key_values=cache).sequences

    new = case.encode([[user(p, "And this?") if p else user("And?")] for p in second])
    ids = torch.cat([history, new["input_ids"]], dim=1)
    mask = [inputs["attention_mask"], torch.ones_like(history[:, -NEW_TOKENS:]), new["attention_mask"]]
    pixel_values, grids = [], []
    for chat, picture in zip(first, second):
        pictures = [block for message in chat for block in message["content"] if block["type"] == "image"]
        if picture is not None:
            pictures.append({"type": "image", "image": picture})
        row = case.encode([{"role": "user", "content": pictures}])
        pixel_values.append(row["pixel_values"])
        grids.append(row["image_grid_thw"])
    whole = {
        "input_ids": ids,
        "attention_mask": torch.cat(mask, dim=1),
        "pixel_values": torch.cat(pixel_values),
        "image_grid_thw": torch.cat(grids),
    }
    case.tiles.clear()
    continued = case.logits(whole, past_key_values=cache)
    encoded = sum(case.tiles)
    assert_same(continued, case.logits(whole, use_cache=False))
    assert encoded == len(new.get("pixel_values", []))
    for row in range(2):
        unpadded = ids[row : row + 1, whole["attention_mask"][row] == 1]
        alone = {"input_ids": unpadded, "pixel_values": pixel_values[row], "image_grid_thw": grids[row]}
        assert_same(continued[row], case.logits(alone)[0])


def test_a_cache_that_ends_inside_a_picture_is_refused(loaded):
    case = loaded("nvila_lite_image")
    inputs = case.encode(ONE)
    start = inputs["input_ids"][0].tolist().index(case.model.config.image_token_id)
    cache = dynamic_cache(case)
    features = case.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    features.pooler_output = [features.pooler_output[0][:2]]
    with torch.no_grad():
        prefix = inputs["input_ids"][:, : start + 2]
        case.model(input_ids=prefix, mm_encoder_outputs={"image": features}, past_key_values=cache)
    with pytest.raises(ValueError, match="inside a picture"):
        case.generate(inputs, past_key_values=cache)


def test_more_placeholders_than_pictures_in_a_continued_chat_are_refused(loaded):
    case = loaded("nvila_lite_image")
    cache = dynamic_cache(case)
    inputs = case.encode([user(RED, "What?")])
    case.generate(inputs, past_key_values=cache)
    whole = case.encode([user(RED, "What?"), said("It is blue"), user(TALL, "And this?")])
    one_picture = {**whole, "pixel_values": inputs["pixel_values"], "image_grid_thw": inputs["image_grid_thw"]}
    with pytest.raises(ValueError, match="placeholders than the 1 pictures"):
        case.generate(one_picture, past_key_values=cache)


@pytest.mark.parametrize("kept", [0, 3], ids=["no cache", "short cache"])
def test_placeholders_without_pictures_are_refused(loaded, kept):
    case = loaded("nvila_lite_image")
    inputs, cache = case.encode(ONE), dynamic_cache(case)
    if kept:
        case.model(input_ids=inputs["input_ids"][:, :kept], past_key_values=cache)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="image placeholders, the pictures have 0 features"):
        case.generate(text, past_key_values=cache)


@pytest.mark.parametrize(
    "absent", [{}, {"pixel_values": None}, {"pixel_values": None, "image_grid_thw": None}], ids=str
)
def test_absent_pictures_may_be_left_out_or_none(loaded, absent):
    case = loaded("nvila_lite_image")
    inputs = case.encode(TEXT)
    assert_same(case.logits({**inputs, **absent}), case.logits(inputs))
