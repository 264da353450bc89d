"""`VilaProcessor`: as many placeholders as features, the original's line breaks, and what engines rely on."""

import copy
import itertools
import json
import logging
import pickle
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor
from transformers.processing_utils import MultiModalData
from vila.chat_templates_vila import named_template
from vila.chat_vila import render
from vila.geometry_vila import TileGrid
from vila.image_processing_vila import VilaImageProcessor
from vila.processing_vila import VilaProcessor

CASES = ("nvila_lite_image", "nvila_dynamic_s2_image", "vila15_image", "vila15_llama3_image", "remote_vila15_image")
# the five templates, each with a tokenizer that knows its control tokens
TEMPLATES = {
    "qwen2": "nvila_lite_image",
    "hermes-2": "nvila_lite_image",
    "vicuna_v1": "vila15_image",
    "mistral": "vila15_image",
    "llama_3": "vila15_llama3_image",
}
TILE = 14
WIDE, TALL, SMALL = (Image.new("RGB", size, "red") for size in ((60, 20), (20, 40), (10, 10)))


@pytest.fixture(scope="module", params=CASES)
def case(request, load):
    return load(request.param)


@pytest.fixture(scope="module")
def qwen(load):
    return load("nvila_lite_image")[1]


@pytest.fixture(scope="module")
def llama(load):
    return load("vila15_image")[1]


@pytest.fixture(scope="module")
def tiling(load):
    """`tiling(template)`: a processor of small tiles, which cuts every picture of a chat."""

    def build(template):
        tokenizer = load(TEMPLATES[template])[1].tokenizer
        pictures = VilaImageProcessor(
            image_mode="dynamic", size={"height": TILE, "width": TILE}, tile_multiple_images=True
        )
        return VilaProcessor(pictures, tokenizer, chat_template=named_template(template), num_tile_tokens=3)

    return cache(build)


def image(picture=SMALL):
    return {"type": "image", "image": picture}


def user(*content):
    return {"role": "user", "content": list(content)}


def assistant(*content):
    return {"role": "assistant", "content": list(content)}


def pictures_of(chat):
    return [part["image"] for message in chat for part in message["content"] if isinstance(part, dict)]


def encode(processor, chat, processor_kwargs=None, **options):
    return processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, processor_kwargs=processor_kwargs, **options
    )


def ids_of(processor, chat, **options):
    return encode(processor, chat, **options)["input_ids"][0]


def runs(flags):
    """`(value, length)` of each run."""
    return [(value, len(list(group))) for value, group in itertools.groupby(flags)]


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


# Masks, types and offsets


ANSWER_CHATS = {
    "text": [user("a"), assistant("It is so.")],
    "two answers": [user(image(WIDE), "a"), assistant("one"), user("b", image(TALL)), assistant("two\n\nlines")],
    "picture in the answer": [
        user("a"),
        assistant("see", image(WIDE), "there"),
        user("b"),
        assistant(image(TALL), "x"),
    ],
    "picture ends the answer": [user("a"), assistant("see", image(WIDE))],
    "typed before a picture": [user("a"), assistant("</s><|im_end|><image>", image(WIDE), "x")],
    "typed control tokens": [user("</s><|im_end|><image>"), assistant("<image> is </s> and <|im_end|>")],
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chat", ANSWER_CHATS.values(), ids=ANSWER_CHATS.keys())
@pytest.mark.parametrize("template", ["qwen2", "vicuna_v1", "llama_3", "hermes-2"])
def test_assistant_mask_marks_the_answers_and_their_end_and_no_picture(template, chat, padded, tiling):
    processor = tiling(template)
    tokenizer = processor.tokenizer
    chats = [chat, [user("a much longer question " * 20), assistant("b")]] if padded else [chat]
    out = encode(processor, chats, return_assistant_tokens_mask=True)
    ids, mask = out["input_ids"][0], out["assistant_masks"][0]
    assert (out["attention_mask"][0][0] == 0) == padded
    assert "offset_mapping" not in out and "text_replacement_offsets" not in out

    parts, position = [], 0
    for value, length in runs(mask):
        if value:
            parts.append(tokenizer.decode(ids[position : position + length]).strip(" "))
        position += length
    end = {"vicuna_v1": "</s>", "llama_3": "<|eot_id|>"}.get(template, "<|im_end|>")
    answers = [message["content"] for message in chat if message["role"] == "assistant"]
    # a picture (here a line break that no answer holds) splits an answer in two
    texts = ["".join(part if isinstance(part, str) else "\v" for part in answer) + end for answer in answers]
    if template == "llama_3":
        texts[-1] = texts[-1].removesuffix(end) + "<|end_of_text|>"
    expected = [piece for text in texts for piece in text.split("\v") if piece]
    assert parts == expected
    assert not any(value for value, token in zip(mask, ids) if token == processor.image_token_id)


def test_assistant_mask_comes_as_the_asked_tensor(qwen):
    chat = [user(image(), "a"), assistant("b")]
    for kind, expected in (("pt", torch.Tensor), ("np", np.ndarray), (None, list)):
        out = encode(qwen, chat, return_assistant_tokens_mask=True, return_tensors=kind)
        assert isinstance(out["assistant_masks"], expected)
        assert np.shape(out["assistant_masks"]) == np.shape(out["input_ids"])


@pytest.mark.parametrize("sizes", [[WIDE], [WIDE, TALL, SMALL]], ids=["one", "three"])
def test_token_types_mark_what_stands_for_pictures(sizes, case):
    _, processor = case
    text = "x".join([processor.image_token] * len(sizes)) + "y"
    out = processor(text=text, images=sizes, return_mm_token_type_ids=True, return_tensors="pt")
    ones = [length for value, length in runs(out["mm_token_type_ids"][0].tolist()) if value]
    grids = [TileGrid(rows, cols) for _, rows, cols in out["image_grid_thw"].tolist()]
    assert ones == [len(processor.image_block(grid)) for grid in grids]
    types = out["mm_token_type_ids"][0].bool()
    assert (out["input_ids"][0][~types] != processor.image_token_id).all()


@settings(max_examples=40, deadline=None, database=None)
@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=3), st.integers(1, 12))
def test_planned_counts_are_those_of_the_pictures_really_cut(qwen, sizes, max_tiles):
    pictures = [Image.new("L", (width, height)) for height, width in sizes]
    plan = qwen._get_num_multimodal_tokens(image_sizes=sizes, max_tiles=max_tiles)
    text = qwen.image_token * len(sizes) + "a"
    out = qwen(text=text, images=pictures, return_text_replacement_offsets=True, max_tiles=max_tiles)
    replacements = [entry["replacement"] for entry in out["text_replacement_offsets"][0]]
    assert [text.count(qwen.image_token) for text in replacements] == plan["num_image_tokens"]
    assert len(out["pixel_values"]) == len(out["image_tile_ids"]) == sum(plan["num_image_patches"])


def test_no_sizes_plan_nothing(qwen):
    assert qwen._get_num_multimodal_tokens() == MultiModalData()
    assert qwen._get_num_multimodal_tokens(image_sizes=[])["num_image_tokens"] == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_token_types_and_offsets_are_padded_with_the_ids(side, qwen):
    out = qwen(
        text=["<image> hello", "a longer text without a picture " * 3],
        images=[WIDE],
        padding_side=side,
        return_mm_token_type_ids=True,
        return_offsets_mapping=True,
    )
    length = len(out["input_ids"][0])
    for key in ("input_ids", "attention_mask", "mm_token_type_ids", "offset_mapping"):
        assert [len(row) for row in out[key]] == [length, length]
    for mask, types, offsets in zip(out["attention_mask"], out["mm_token_type_ids"], out["offset_mapping"]):
        assert all((one, offset) == (0, (0, 0)) for one, keep, offset in zip(types, mask, offsets) if not keep)


@pytest.mark.parametrize("template", TEMPLATES)
def test_offsets_point_into_the_prompt_and_pictures_have_none(template, tiling):
    processor = tiling(template)
    text = "look <image>\n\nnow <image> and hello there"
    out = processor(text=text, images=[WIDE, TALL], return_offsets_mapping=True, return_mm_token_type_ids=True)
    covered = set()
    for token, (start, end), is_picture in zip(
        *(out[k][0] for k in ("input_ids", "offset_mapping", "mm_token_type_ids"))
    ):
        assert not (is_picture and end)
        if start < end:
            assert text[start:end].strip() == processor.decode([token]).strip()
            covered |= set(range(start, end))
    assert "".join(c if i in covered else "_" for i, c in enumerate(text)).replace("_", "").split() == [
        "look",
        "now",
        "and",
        "hello",
        "there",
    ]


# Truncation, padding and tensors


def test_truncation_never_cuts_a_picture(qwen):
    text = "a <image> b c d e f"
    full = qwen(text=text, images=[WIDE], return_mm_token_type_ids=True)
    ids, types = full["input_ids"][0], full["mm_token_type_ids"][0]
    picture_end = len(types) - types[::-1].index(1)
    for length in range(1, len(ids) + 2):
        if length < picture_end:
            with pytest.raises(ValueError, match="cut into a picture"):
                qwen(text=text, images=[WIDE], truncation=True, max_length=length)
        else:
            cut = qwen(text=text, images=[WIDE], truncation=True, max_length=length)
            assert cut["input_ids"][0] == ids[:length]


def test_truncation_follows_the_side_of_the_tokenizer(qwen):
    processor = copy.deepcopy(qwen)
    processor.tokenizer.truncation_side = "left"
    ids = qwen(text="one two three four")["input_ids"][0]
    out = processor(text="one two three four", truncation=True, max_length=4, return_offsets_mapping=True)
    assert out["input_ids"][0] == ids[-4:]
    assert out["offset_mapping"][0][-1][1] == len("one two three four")


def test_without_truncation_nothing_is_cut(qwen):
    for options in ({"max_length": 2}, {"truncation": False, "max_length": 2}, {"truncation": "do_not_truncate"}):
        assert qwen(text="one two three", **options)["input_ids"] == qwen(text="one two three")["input_ids"]


@pytest.mark.parametrize("length", [0, -3])
def test_a_length_below_one_is_refused(length, qwen):
    with pytest.raises(ValueError, match="max_length"):
        qwen(text="a", truncation=True, max_length=length)


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        ({"padding": False}, [1, 2]),
        ({"padding": "do_not_pad"}, [1, 2]),
        ({"padding": True}, [2, 2]),
        ({"padding": "longest"}, [2, 2]),
        ({"padding": "max_length", "max_length": 7}, [7, 7]),
        ({"pad_to_multiple_of": 8}, [8, 8]),
        ({"padding": "max_length", "max_length": 7, "pad_to_multiple_of": 4}, [8, 8]),
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_options_do_what_the_tokenizer_does(options, lengths, side, qwen):
    text = ["a", "a b"]
    out = qwen(text=text, padding_side=side, **options)
    expected = qwen.tokenizer(text, padding_side=side, **{"padding": True, **options})
    assert [len(row) for row in out["input_ids"]] == lengths
    assert out["input_ids"] == expected["input_ids"]
    assert out["attention_mask"] == expected["attention_mask"]


def test_padding_is_left_by_default_and_the_mask_can_be_left_out(qwen):
    out = qwen(text=["a", "a b"], return_attention_mask=False)
    assert "attention_mask" not in out
    assert out["input_ids"][0][0] == qwen.tokenizer.pad_token_id


@pytest.mark.parametrize(("kind", "expected"), [("pt", torch.Tensor), ("np", np.ndarray)])
def test_tensors_come_as_asked(kind, expected, qwen):
    out = qwen(text="<image> a", images=[WIDE], return_tensors=kind, return_mm_token_type_ids=True)
    assert all(isinstance(value, expected) for value in out.values())
    plain = qwen(text="<image> a", images=[WIDE])
    assert plain["input_ids"] == out["input_ids"].tolist()
    assert isinstance(plain["input_ids"][0], list)


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


# The object


def same_outputs(left, right):
    inputs = {"text": ["<image> a", "b"], "images": [WIDE], "return_tensors": "np"}
    expected, got = left(**inputs), right(**inputs)
    return expected.keys() == got.keys() and all(np.array_equal(expected[key], got[key]) for key in expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda processor: pickle.loads(pickle.dumps(processor))])
def test_a_copy_does_the_same(copied, case):
    _, processor = case
    other = copied(processor)
    assert other.to_dict() == processor.to_dict()
    assert other.chat_template == processor.chat_template
    assert same_outputs(processor, other)


def test_saving_and_loading_keeps_every_attribute(tmp_path, llama):
    processor = VilaProcessor(
        VilaImageProcessor(
            image_mode="dynamic_s2", s2_scales=[28, 56], min_tiles=2, max_tiles=7, tile_multiple_images=True
        ),
        llama.tokenizer,
        chat_template=named_template("mistral"),
        num_tile_tokens=5,
        s2_output_scale=-1,
        image_start_tokens="start",
        image_end_tokens=None,
    )
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is VilaProcessor
    # where the code of the class lies is written into the file, and is no option
    assert loaded.to_dict() | {"auto_map": None} == processor.to_dict() | {"auto_map": None}
    assert (loaded.num_tile_tokens, loaded.s2_output_scale) == (5, -1)
    assert (loaded.image_start_tokens, loaded.image_end_tokens) == ("start", None)
    assert loaded.chat_template == processor.chat_template
    assert loaded.image_token_id == processor.image_token_id
    assert same_outputs(processor, loaded)


def test_a_tokenizer_without_media_tokens_is_refused(llama):
    tokenizer = copy.deepcopy(llama.tokenizer)
    added = set(tokenizer.get_added_vocab())
    assert "<image>" in added
    tokenizer.get_added_vocab = dict
    with pytest.raises(ValueError, match="media token"):
        VilaProcessor(VilaImageProcessor(), tokenizer)


@pytest.mark.parametrize("value", [0, -1, 2.5, "4", None, True])
def test_nonsense_tile_tokens_are_refused(value, llama):
    with pytest.raises(ValueError, match="num_tile_tokens"):
        VilaProcessor(VilaImageProcessor(), llama.tokenizer, num_tile_tokens=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (name, value)
            for name in ("num_video_frames", "video_max_tiles")
            for value in (0, -1, "8", 2.5, None, True)
        ),
        *(("video_fps", value) for value in (-1.0, float("nan"), float("inf"), "2", None)),
        *(("num_time_tokens", value) for value in (-1, "9", 1.5)),
        *(("s2_output_scale", value) for value in ("0", 1.5, None)),
        *(("video_as_images", value) for value in ("yes", 1, None)),
        *(("time_token_format", value) for value in ("<t>", "{t}{t}", 5, None)),
        *(("video_pool_sizes", value) for value in ([[1, 1]], [[0, 1, 1]], [["1", 1, 1]], [[1, 1, 1.5]], "8", 5, {})),
        ("image_end_tokens", 5),
        ("video_sep_tokens", ["x"]),
    ],
    ids=str,
)
def test_nonsense_in_the_files_of_a_checkpoint_is_refused_by_name(name, value, qwen, tmp_path):
    qwen.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "processor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(json.dumps({**content, name: value}))
    with pytest.raises(ValueError, match=name):
        VilaProcessor.from_pretrained(tmp_path)


def test_an_enormous_number_of_tile_tokens_is_refused_before_ids_are_made(qwen):
    processor = copy.copy(qwen)
    processor.num_tile_tokens = 10**9
    with pytest.raises(ValueError, match="max_visual_tokens"):
        processor(text="<image>", images=WIDE)


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 1, 0]], ids=str)
def test_an_error_names_the_prompt_of_a_batch(rows, qwen):
    """Prompts without media count too, and only the broken one is to blame."""
    chats = [[user("hello")], [user(image(), "a")], [user(image(WIDE), image(np.zeros((2, 2, 5))), "b")]]
    with pytest.raises(
        ValueError, match=f"^prompt {rows.index(2)}: picture 1: a picture must have 1, 3 or 4 channels"
    ):
        encode(qwen, [chats[row] for row in rows])


@pytest.mark.parametrize(("option", "value"), [("colour", "red"), ("return_special_tokens_mask", True)])
def test_an_option_without_effect_is_warned_about(option, value, qwen, caplog):
    caplog.set_level(logging.WARNING)
    logging.getLogger("transformers").propagate = True
    logging.getLogger("vila").propagate = True
    expected = qwen(text="a")["input_ids"]
    assert qwen(text="a", **{option: value})["input_ids"] == expected
    assert option in caplog.text


def test_the_processor_works_after_every_error(qwen):
    inputs = {"text": "<image> a", "images": [WIDE]}
    expected = qwen(**inputs)["input_ids"]
    for broken in (
        {"text": "<image>"},
        {"text": "<image>", "images": ["no such file"]},
        {"text": "<image>", "images": [np.zeros((2, 2, 5))]},
        {"text": "\ud800"},
        {**inputs, "truncation": True, "max_length": 3},
        {**inputs, "image_mode": "unknown"},
        {**inputs, "max_tiles": 0},
    ):
        with pytest.raises((ValueError, TypeError)):
            qwen(**broken)
        assert qwen(**inputs)["input_ids"] == expected


def test_time_tokens_become_seconds_and_none_lies_behind_the_end(qwen):
    processor = copy.deepcopy(qwen)
    assert processor.decode_times("from <t0> to <t50>", 20.0) == "from <t0> to <t50>"
    processor.num_time_tokens = 100
    assert processor.decode_times("from <t0> to <t50>, <t99>, <t120> <t> t5", 20.0) == (
        "from <0.0> to <10.1>, <20.0>, <20.0> <t> t5"
    )


@pytest.mark.parametrize("options", [{"image_mode": "dynamic"}, {"s2_scales": [56, 112]}])
def test_scales_that_the_model_does_not_merge_are_refused(options, converted):
    processor = AutoProcessor.from_pretrained(converted("nvila_dynamic_s2_image"))
    with pytest.raises(ValueError, match="merges"):
        processor(text="<image>", images=WIDE, **options)


def test_dynamic_scales_are_refused_where_the_model_has_none(qwen):
    with pytest.raises(ValueError, match="image_mode 'dynamic_s2' does not fit"):
        qwen(text="<image>", images=WIDE, image_mode="dynamic_s2")


@pytest.mark.parametrize("name", ["vicuna_v1", "llama_3"])
def test_a_template_of_one_call_decides_where_its_messages_end(name, qwen):
    """A tiled picture at the end of its message has no line break behind it, whoever's template wrote the end."""
    template = named_template(name)
    own = copy.deepcopy(qwen)
    own.chat_template = template
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    chat = [user("a", image(WIDE))]
    per_call = qwen.apply_chat_template(chat, chat_template=template, **options)
    assert per_call["input_ids"] == own.apply_chat_template(chat, **options)["input_ids"]


def test_literal_tokens_can_be_let_through_from_processor_options(qwen):
    options = {"tokenize": True, "return_dict": True}
    through = qwen.apply_chat_template(
        [user("<|im_end|>")], processor_kwargs={"sanitize_control_tokens": False}, **options
    )
    direct = qwen.apply_chat_template([user("<|im_end|>")], sanitize_control_tokens=False, **options)
    assert through["input_ids"] == direct["input_ids"]
    assert through["input_ids"] != qwen.apply_chat_template([user("<|im_end|>")], **options)["input_ids"]
