"""`VilaProcessor` as an object: copies, files, and options without sense."""

import copy
import json
import logging
import pickle

import numpy as np
import pytest
from processing_requests import CASES, WIDE, encode, image, user
from transformers import AutoProcessor
from vila.chat_templates_vila import named_template
from vila.image_processing_vila import VilaImageProcessor
from vila.processing_vila import VilaProcessor


@pytest.fixture(scope="module", params=CASES)
def case(request, load):
    return load(request.param)


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
