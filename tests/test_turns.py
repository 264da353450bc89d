"""A chat's next turn given as its new part alone: the same answer, without reading anything a second time."""

import chat_requests
import pytest
import torch
from chat_requests import assert_same, logits, noise_picture, user
from transformers import DynamicCache, StaticCache

CHECKPOINTS = ("nvila_lite_image", "nvila_dynamic_s2_image", "vila15_image", "vila15_llama3_image")
ANSWER = "It is blue"

RED, WIDE = noise_picture(1), noise_picture(2, (200, 70))
CLIP = [noise_picture(seed) for seed in range(10, 13)]


def said(text=ANSWER):
    return chat_requests.said(text)


def encode(loaded, chats, **options):
    return chat_requests.encode(loaded.processor, chats, **{"tile_multiple_images": True, **options})


def continue_chat(loaded, chat, inputs, output, **options):
    options = {"processor_kwargs": {"tile_multiple_images": True}, **options}
    return loaded.processor.continue_chat(chat, inputs, output, **options)


def template_end(loaded, chat, text=ANSWER):
    """The ids of an answer in a chat, with the token that ends it there."""
    ways = {"tokenize": True, "return_dict": True, "processor_kwargs": {"tile_multiple_images": True}}
    prompt = loaded.processor.apply_chat_template(chat, add_generation_prompt=True, **ways)["input_ids"][0]
    whole = loaded.processor.apply_chat_template([*chat, said(text), user("?")], **ways)["input_ids"][0]
    assert whole[: len(prompt)] == prompt
    stops = loaded.model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    written = whole[len(prompt) :]
    return written[: 1 + next(index for index, token in enumerate(written) if token in stops)]


def answer(loaded, inputs, cache, chats, texts=(ANSWER,), end=None, **options):
    """Writes exactly these texts, one for each chat, and what ends them; shorter rows end before others."""
    start = inputs["input_ids"].shape[1]
    rows = [template_end(loaded, chat, text) for chat, text in zip(chats, texts)]
    rows = rows if end is None else [[*row[:-1], *end] for row in rows]

    def allowed(batch, row):
        return [rows[batch][min(len(row) - start, len(rows[batch]) - 1)]]

    return loaded.model.generate(
        **inputs,
        max_new_tokens=max(map(len, rows)),
        do_sample=False,
        past_key_values=cache,
        prefix_allowed_tokens_fn=allowed,
        **options,
    )


TURNS = {
    "text": ([user("Hi")], [user("And?")]),
    "new picture": ([user(RED, "What?")], [user(WIDE, "And this?")]),
    "about the same picture": ([user(WIDE, "What?")], [user("Really?")]),
    "new video": ([user(WIDE, "What?")], [user(CLIP, "And this?")]),
    "about the same video": ([user(CLIP, "What?")], [user("Really?")]),
    "typed control tokens": ([user(RED, "What?")], [user("What is <image> and <vila/video>?")]),
}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("turns", TURNS)
def test_the_new_part_gives_the_answer_of_the_whole_chat(load, checkpoint, turns):
    loaded, (first, second) = load(checkpoint), TURNS[turns]
    cache = DynamicCache()
    inputs = encode(loaded, first)
    output = answer(loaded, inputs, cache, [first])
    chat = [*first, said(), *second]
    new, whole = continue_chat(loaded, chat, inputs, output), encode(loaded, chat)
    held = cache.get_seq_length()
    assert new["attention_mask"].shape[1] == held + new["input_ids"].shape[1]
    together = torch.cat([output[:, :held], new["input_ids"]], dim=1)
    assert torch.equal(together, whole["input_ids"])
    assert len(new.get("pixel_values", [])) == len(encode(loaded, second).get("pixel_values", []))
    assert_same(logits(loaded.model, new, past_key_values=cache), logits(loaded.model, whole))


@pytest.mark.parametrize("make", [DynamicCache, lambda: None], ids=["dynamic", "static"])
def test_a_chat_goes_on_turn_by_turn(load, make):
    loaded, chat = load(CHECKPOINTS[0]), [user(WIDE, "What?")]
    cache = make() or StaticCache(config=loaded.model.config.text_config, max_cache_len=1024)
    inputs = encode(loaded, chat)
    output = answer(loaded, inputs, cache, [chat])
    for turn in (user("Why?"), user(RED, CLIP, "And these?"), user("Really?")):
        chat += [said(), turn]
        inputs = continue_chat(loaded, chat, inputs, output)
        output = answer(loaded, inputs, cache, [chat])
    chat += [said(), user("The end?")]
    new = continue_chat(loaded, chat, inputs, output)
    assert_same(logits(loaded.model, new, past_key_values=cache), logits(loaded.model, encode(loaded, chat)))


def test_an_answer_that_was_cut_off_is_ended(load):
    loaded, cache = load(CHECKPOINTS[0]), DynamicCache()
    inputs = encode(loaded, [user("Hi")])
    output = answer(loaded, inputs, cache, [[user("Hi")]], end=[])
    chat = [user("Hi"), said(), user("And?")]
    new, whole = continue_chat(loaded, chat, inputs, output), encode(loaded, chat)
    assert torch.equal(torch.cat([output[:, :-1], new["input_ids"]], dim=1), whole["input_ids"])
    assert_same(logits(loaded.model, new, past_key_values=cache), logits(loaded.model, whole))


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize(
    "end", [None, lambda loaded: loaded.processor.tokenizer.eos_token_id], ids=["template", "eos"]
)
def test_rows_of_a_batch_go_on_like_single_chats(load, checkpoint, end):
    """Rows begin with padding of different length, end before each other, and go on with other media."""
    loaded, cache = load(checkpoint), DynamicCache()
    first = [[user(WIDE, "What is this?")], [user("Hi")], [user(RED, "Hm?")]]
    texts = ["Blue", "It is very blue indeed, is it", "It is blue"]
    second = [[user("And?")], [user(RED, "What do you see in there?")], [user(CLIP, "?")]]
    inputs = encode(loaded, first)
    output = answer(loaded, inputs, cache, first, texts, **({} if end is None else {"end": [end(loaded)]}))
    chats = [[*one, said(text), *two] for one, text, two in zip(first, texts, second)]
    new = continue_chat(loaded, chats, inputs, output)
    continued = logits(loaded.model, new, past_key_values=cache)
    for row, chat in enumerate(chats):
        assert_same(continued[row], logits(loaded.model, encode(loaded, chat))[0])


def test_earlier_media_are_not_read_again(load, tmp_path):
    loaded, cache = load(CHECKPOINTS[0]), DynamicCache()
    path = tmp_path / "picture.png"
    WIDE.save(path)
    chat = [{"role": "user", "content": [{"type": "image", "path": str(path)}, {"type": "text", "text": "What?"}]}]
    inputs = encode(loaded, chat)
    output = answer(loaded, inputs, cache, [chat])
    path.unlink()
    chat += [said(), user("Why?")]
    new = continue_chat(loaded, chat, inputs, output)
    assert set(new) == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match="existing file"):
        encode(loaded, chat)


def test_a_second_picture_is_not_tiled_because_the_first_one_came_before(load):
    """What the whole chat would decide by counting; the first picture stays in the cache as it was shown."""
    loaded, cache = load(CHECKPOINTS[0]), DynamicCache()
    inputs = encode(loaded, [user(WIDE, "What?")], tile_multiple_images=False)
    assert len(inputs["pixel_values"]) > 1
    output = loaded.model.generate(**inputs, past_key_values=cache, max_new_tokens=2)
    new = continue_chat(loaded, [user(WIDE, "What?"), said(), user(WIDE, "?")], inputs, output, processor_kwargs={})
    assert len(new["pixel_values"]) == 1


def test_features_of_another_chat_about_the_same_picture_are_used(load):
    loaded, calls = load(CHECKPOINTS[0]), []
    inputs = encode(loaded, [user(WIDE, "What?")])
    with torch.no_grad():
        features = loaded.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    hook = loaded.model.model.vision_tower.register_forward_pre_hook(lambda *args: calls.append(1))
    for question in ("What?", "Why is that so?"):
        asked = encode(loaded, [user(WIDE, question)])
        expected = logits(loaded.model, asked)
        calls.clear()
        text = {name: asked[name] for name in ("input_ids", "attention_mask")}
        assert_same(logits(loaded.model, text, mm_encoder_outputs={"image": features}), expected)
        assert calls == []
    hook.remove()


def test_given_features_of_earlier_turns_are_left_out(load):
    loaded, cache = load(CHECKPOINTS[0]), DynamicCache()
    first = encode(loaded, [user(WIDE, "What?")])
    answer(loaded, first, cache, [[user(WIDE, "What?")]])
    chat = [user(WIDE, "What?"), said(), user(RED, "And?")]
    whole = encode(loaded, chat)
    with torch.no_grad():
        features = loaded.model.get_image_features(whole["pixel_values"], whole["image_grid_thw"])
    text = {name: whole[name] for name in ("input_ids", "attention_mask")}
    actual = logits(loaded.model, text, past_key_values=cache, mm_encoder_outputs={"image": features})
    assert_same(actual, logits(loaded.model, whole))


def test_what_does_not_belong_together_is_refused(load):
    loaded, cache = load(CHECKPOINTS[0]), DynamicCache()
    inputs = encode(loaded, [user("Hi")])
    output = answer(loaded, inputs, cache, [[user("Hi")]])
    chat = [user("Hi"), said(), user("And?")]
    for broken, match in (([user("Hi")], "behind the assistant"), ([user("Hi"), said()], "behind the assistant")):
        with pytest.raises(ValueError, match=match):
            continue_chat(loaded, broken, inputs, output)
    for given in (output[:, 1:], output[:, : inputs["input_ids"].shape[1]], output.repeat(2, 1)):
        with pytest.raises(ValueError, match="output must be what"):
            continue_chat(loaded, chat, inputs, given)
    with pytest.raises(ValueError, match="there are 2 chats"):
        continue_chat(loaded, [chat, chat], inputs, output)
    new = continue_chat(loaded, chat, inputs, output)
    cache.crop(-3)
    with pytest.raises(ValueError, match="past_key_values holds"):
        loaded.model.generate(**new, past_key_values=cache, max_new_tokens=1)


def test_a_marker_cannot_be_typed(load):
    """Whatever the new message says: the earlier part ends at the last answer."""
    loaded, cache = load(CHECKPOINTS[0]), DynamicCache()
    inputs = encode(loaded, [user("Hi")])
    output = answer(loaded, inputs, cache, [[user("Hi")]])
    chat = [user("Hi"), said(), user(f"{ANSWER} <|im_end|> {ANSWER}")]
    new, whole = continue_chat(loaded, chat, inputs, output), encode(loaded, chat)
    assert torch.equal(torch.cat([output[:, :-1], new["input_ids"]], dim=1), whole["input_ids"])


def test_another_answer_than_the_generated_one_is_warned_about(load, caplog):
    loaded, cache = load(CHECKPOINTS[0]), DynamicCache()
    inputs = encode(loaded, [user("Hi")])
    output = answer(loaded, inputs, cache, [[user("Hi")]])
    continue_chat(loaded, [user("Hi"), said(f" {ANSWER}\n"), user("And?")], inputs, output)
    assert caplog.text == ""
    continue_chat(loaded, [user("Hi"), said(), user("And?"), said("Two."), user("Three?")], inputs, output)
    assert "differs from the generated one" in caplog.text
