"""`VilaProcessor`: masks, token types, offsets, truncation, padding, and what engines rely on."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processing_requests import CASES, SMALL, TALL, TEMPLATES, WIDE, assistant, encode, image, runs, user
from transformers.processing_utils import MultiModalData
from vila.geometry_vila import TileGrid


@pytest.fixture(scope="module", params=CASES)
def case(request, load):
    return load(request.param)


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
