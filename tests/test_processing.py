"""`VilaProcessor`: as many placeholders as features, the original's line breaks, and batches."""

import copy

import numpy as np
import pytest
import torch
from processing_requests import (
    CASES,
    SMALL,
    TALL,
    TEMPLATES,
    WIDE,
    assistant,
    encode,
    ids_of,
    image,
    pictures_of,
    user,
)
from vila.chat_vila import render
from vila.image_processing_vila import VilaImageProcessor


@pytest.fixture(scope="module", params=CASES)
def case(request, load):
    return load(request.param)


# Placeholders


CHATS = {
    "no picture": [user("hello")],
    "one": [user(image(WIDE), "what?")],
    "several": [user(image(WIDE), "and", image(TALL), image(SMALL), "?")],
    "two turns": [user(image(TALL), "what?"), assistant("that"), user("and", image(WIDE))],
    "in every role": [{"role": "system", "content": [image()]}, user("a"), assistant("b", image(TALL)), user("c")],
}


@pytest.mark.parametrize(
    "options",
    [{}, {"tile_multiple_images": True}, {"image_mode": "resize"}, {"image_mode": "pad"}, {"image_mode": "plain"}],
    ids=["own mode", "tiled", "resize", "pad", "plain"],
)
@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS.keys())
def test_placeholders_are_as_many_as_feature_rows(chat, options, case):
    model, processor = case
    inputs = encode(processor, chat, options, return_tensors="pt")
    placeholders = int((inputs["input_ids"] == model.config.image_token_id).sum())
    if "pixel_values" not in inputs:
        assert placeholders == 0
        return
    with torch.no_grad():
        features = model(**inputs).image_hidden_states
    assert placeholders == sum(len(rows) for rows in features)
    assert len(features) == len(pictures_of(chat))


@pytest.mark.parametrize(
    ("name", "end"),
    # Llama tokenizers put a BOS before every text, as the original's end token shows
    [
        ("nvila_lite_image", ["\n"]),
        ("vila15_llama3_image", ["<|begin_of_text|>", "\n"]),
        ("vila15_image", ["<s>", "", "\n"]),
    ],
)
def test_every_view_stands_between_start_and_end_ids(name, end, load):
    processor = copy.copy(load(name)[1])
    tokenizer, marker, rows = processor.tokenizer, processor.image_token_id, processor.num_tile_tokens
    grid = VilaImageProcessor().tile_grids([(10, 10)])[0]
    end_ids = processor.image_block(grid)[rows:]
    assert [tokenizer.decode([token]) for token in end_ids] == end

    processor.image_start_tokens, processor.image_end_tokens = "view", None
    start_ids = tokenizer("view")["input_ids"]
    assert processor.image_block(grid) == start_ids + [marker] * rows
    processor.image_start_tokens = None
    assert processor.image_block(grid) == [marker] * rows


def test_bare_views_of_old_training_code_leave_no_end_token(llama):
    bare = copy.copy(llama)
    bare.image_end_tokens = None
    chat = [user(image(), "a")]
    end = len(llama.tokenizer("\n")["input_ids"])
    assert len(ids_of(bare, chat)) == len(ids_of(llama, chat)) - end


# Line breaks of tiled pictures: an independent reference on strings


def original_ids(processor, chat, add_generation_prompt):
    """As the original does it: `<image>` -> one `<image>` and line break per tile, then strip, render and tokenize."""
    tokenizer = processor.tokenizer
    messages = []
    for message in chat:
        text = ""
        for part in message["content"]:
            if isinstance(part, str):
                text += part
            else:
                grid = processor.image_processor.tile_grids([(part["image"].height, part["image"].width)])[0]
                tiles = grid.rows * grid.cols
                text += "<image>\n" * (tiles + 1) if tiles > 1 else "<image>"
        messages.append({"role": message["role"], "content": text.strip()})
    tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    text = render(messages, processor.chat_template, tokens, add_generation_prompt)
    ids = []
    for token in tokenizer(text)["input_ids"]:
        if token == processor.image_token_id:
            ids += [token] * processor.num_tile_tokens + tokenizer("\n")["input_ids"]
        else:
            ids.append(token)
    return ids


SHOTS = [user(image(WIDE), "cat?"), assistant("yes"), user(image(TALL), "dog?"), assistant("no")]
TILED_CHATS = {
    "first": [user(image(WIDE), "what is it?")],
    "middle": [user("look: ", image(WIDE), " what is it?")],
    "last": [user("what is it?", image(WIDE))],
    "alone": [user(image(WIDE))],
    "line breaks around": [user("\n\na\n", image(TALL), "\n\n  b\n\n")],
    "spaces around": [user("  a  ", image(TALL), "  b  ")],
    "only spaces behind": [user("a", image(TALL), " \n ")],
    "adjacent": [user(image(TALL), image(WIDE), image(TALL))],
    "with an uncut one": [user(image(SMALL), "a", image(WIDE), image(SMALL))],
    "uncut and last": [user(image(WIDE), image(SMALL)), assistant("a"), user("b", image(SMALL))],
    "two turns": [user(image(WIDE), "a"), assistant("b"), user("c", image(TALL))],
    "first turn ends": [user("a", image(WIDE)), assistant("b"), user("c")],
    "few shots": [*SHOTS, user(image(WIDE), "bird?")],
    "few shots, pictures last": [*SHOTS[:2], user("dog?", image(TALL)), assistant("no"), user("bird?", image(WIDE))],
    "in an answer": [user("draw"), assistant("here", image(WIDE)), user("more"), assistant(image(TALL), "done")],
    "answer ends": [user("draw"), assistant("here", image(WIDE))],
    "in the system text": [{"role": "system", "content": ["be", image(WIDE)]}, user("a", image(TALL))],
    "two user messages": [user("a", image(WIDE)), user(image(TALL), "b")],
}


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("chat", TILED_CHATS.values(), ids=TILED_CHATS.keys())
@pytest.mark.parametrize("template", TEMPLATES)
def test_tiled_pictures_have_the_line_breaks_of_the_original(template, chat, add_generation_prompt, tiling):
    processor = tiling(template)
    expected = original_ids(processor, chat, add_generation_prompt)
    assert ids_of(processor, chat, add_generation_prompt=add_generation_prompt) == expected


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("chat", TILED_CHATS.values(), ids=TILED_CHATS.keys())
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_equals_its_rendered_text_and_pictures(template, chat, add_generation_prompt, tiling):
    processor = tiling(template)
    text = processor.apply_chat_template(chat, add_generation_prompt=add_generation_prompt)
    pictures = pictures_of(chat)
    from_chat = encode(processor, chat, add_generation_prompt=add_generation_prompt, return_tensors="np")
    from_text = processor(text=text, images=pictures, return_tensors="np")
    assert from_chat.keys() == from_text.keys()
    assert all(np.array_equal(from_chat[key], from_text[key]) for key in from_chat)


def test_special_tokens_can_be_left_out(llama):
    chat = [user("a")]
    bos = llama.tokenizer.bos_token_id
    assert ids_of(llama, chat)[0] == bos
    for options in ({"add_special_tokens": False}, {"text_kwargs": {"add_special_tokens": False}}):
        assert ids_of(llama, chat, processor_kwargs=options) == ids_of(llama, chat)[1:]


# Batches


ROWS = [
    [user("hello")],
    [user(image(WIDE), "what is it?")],
    [user("compare", image(TALL), image(SMALL)), assistant("no"), user(image(WIDE), "now?")],
    [user("a much longer text without any picture in it")],
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 1), (3, 1)])
def test_batch_rows_equal_single_rows(order, side, case):
    _, processor = case
    batch = encode(processor, [ROWS[i] for i in order], {"padding_side": side}, return_tensors="pt")
    pixels = []
    for row, index in enumerate(order):
        single = encode(processor, ROWS[index], return_tensors="pt")
        mask = batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row][mask], single["input_ids"][0])
        assert mask.tolist() == sorted(mask.tolist(), reverse=side == "right")
        assert (batch["input_ids"][row][~mask] == processor.tokenizer.pad_token_id).all()
        pixels += [single["pixel_values"]] if "pixel_values" in single else []
    assert torch.equal(batch["pixel_values"], torch.cat(pixels))


def test_flat_and_nested_pictures_are_the_same(qwen):
    text = ["<image> a", "b", "<image><image> c"]
    flat = qwen(text=text, images=[WIDE, TALL, SMALL], return_tensors="np")
    for images in ([[WIDE], [], [TALL, SMALL]], ([WIDE], [], [TALL, SMALL]), [[WIDE, TALL, SMALL]]):
        nested = qwen(text=text, images=images, return_tensors="np")
        assert all(np.array_equal(flat[key], nested[key]) for key in flat)
    single = qwen(text="<image> a", images=WIDE)
    assert single["input_ids"] == qwen(text="<image> a", images=[WIDE])["input_ids"]
    assert single["input_ids"] == qwen(text=("<image> a",), images=[[WIDE]])["input_ids"]


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("<image><image>", [WIDE], "prompt 0 has 2 <image> token.* 1 picture"),
        ("<image>", [WIDE, TALL], "prompt 0 has 1 <image> token.* 2 picture"),
        ("a", [WIDE], "prompt 0 has 0 <image> token.* 1 picture"),
        ("<image>", None, "has 1 <image> token.* 0 picture"),
        ("<image>", [], "has 1 <image> token.* 0 picture"),
        (["<image>", "<image>"], [[WIDE, TALL], []], "prompt 0 has 1 <image> token.* 2 picture"),
        (["<image>", "a"], [[WIDE], [TALL]], "prompt 1 has 0 <image> token.* 1 picture"),
        (["<image>", "<image>"], [WIDE], "has 2 <image> token.* 1 picture"),
        (["a", "<image>", "b"], [[WIDE], [TALL]], "3 prompt.* 2 lists"),
        (["<image>"], [WIDE, [TALL]], "mixes"),
        ("<vila/video>", None, "1 <vila/video> token"),
    ],
)
def test_pictures_that_do_not_match_the_text_are_refused_with_both_counts(text, images, message, qwen):
    with pytest.raises(ValueError, match=message):
        qwen(text=text, images=images)


@pytest.mark.parametrize(
    "text",
    [None, [], (), 5, True, b"a", {"a": 1}, [5], ["a", None], [["a"]], ["a", ["b"]], "\ud800", ["a", "\udc00b"]],
)
def test_a_prompt_that_is_no_text_is_a_value_error(text, qwen):
    with pytest.raises(ValueError, match=r"text must be|surrogate"):
        qwen(text=text)


def test_a_prompt_without_any_token_is_refused(qwen):
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        qwen(text=["a", ""])


@pytest.mark.parametrize(
    ("options", "match"), [({"videos": [[WIDE]]}, "0 <vila/video> .* 1 video"), ({"audio": [np.zeros(8)]}, "no audio")]
)
def test_media_without_a_place_are_refused(options, match, qwen):
    with pytest.raises(ValueError, match=match):
        qwen(text="a", **options)


# Generation prompts


@pytest.mark.parametrize("template", TEMPLATES)
def test_continue_final_message_ends_with_what_the_assistant_began(template, tiling):
    processor = tiling(template)
    chat = [user(image(WIDE), "what?"), assistant("It is a")]
    ids = ids_of(processor, chat, continue_final_message=True)
    assert processor.decode(ids).endswith("It is a")
    opened = ids_of(processor, chat[:1], add_generation_prompt=True)
    assert ids[: len(opened) - 1] == opened[:-1]
    with pytest.raises(ValueError, match="not compatible"):
        ids_of(processor, chat, continue_final_message=True, add_generation_prompt=True)
