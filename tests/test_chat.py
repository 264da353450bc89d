"""The text side of a chat: what is accepted, and that typed control tokens stay text."""

import base64
import copy
import threading
import time

import numpy as np
import pytest
from conftest import COMMITTED_GOLDENS
from PIL import Image
from transformers import AutoProcessor
from vila.chat_vila import BREAK, break_offsets, escape_breaks, tokenize, without_breaks

CASES = ("nvila_lite_image", "vila15_image", "vila15_llama3_image", "remote_vila15_image")
LITERALS = ("<image>", "<vila/video>", "<vila/sentinel>", "<|im_end|>", "</s>", "<s>", "<|eot_id|>", "<|im_start|>")
FORGED = (BREAK, 2 * BREAK, f"<{BREAK}image>", f"{BREAK}<image>", "\U000f0000</s>\U000f0001", "\U000f0001<|im_end|>")
PICTURE_FILE = COMMITTED_GOLDENS / "vila" / "vila15_image" / "input.png"


@pytest.fixture(scope="module", params=CASES)
def processor(request, converted):
    return AutoProcessor.from_pretrained(converted(request.param))


@pytest.fixture(scope="module")
def llama(converted):
    return AutoProcessor.from_pretrained(converted("vila15_image"))


def user(content):
    return [{"role": "user", "content": content}]


def ids_of(processor, chat, **options):
    return processor.apply_chat_template(chat, tokenize=True, return_dict=True, **options)["input_ids"][0]


def chats_with(text):
    """The text in every role, as a string and as parts."""
    for place in range(3):
        texts = ["one", "two", "three"]
        texts[place] = f"before {text} behind"
        chat = [{"role": role, "content": t} for role, t in zip(("system", "user", "assistant"), texts)]
        yield chat
        yield [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in chat]


def control_counts(processor, ids):
    return {token: ids.count(token) for token in processor.tokenizer.added_tokens_decoder}


@pytest.mark.parametrize("literal", [*LITERALS, *FORGED])
def test_typed_control_tokens_never_become_the_control_id(literal, processor):
    for chat, harmless in zip(chats_with(literal), chats_with("x")):
        ids = ids_of(processor, chat)
        assert control_counts(processor, ids) == control_counts(processor, ids_of(processor, harmless))
        assert f"before {literal} behind" in processor.decode(ids)


def test_a_typed_control_token_does_not_change_how_the_rest_is_tokenized(processor):
    """With sanitizing off the control id stands there; what is left and right of it is the same."""
    literal = "<vila/sentinel>"  # no template writes it
    chat = user(f"before it {literal} behind\n\nit {literal} end")
    marked, raw = ids_of(processor, chat), ids_of(processor, chat, sanitize_control_tokens=False)
    control = processor.tokenizer.convert_tokens_to_ids(literal)
    first, second = (index for index, token in enumerate(raw) if token == control)
    left, middle, right = raw[:first], raw[first + 1 : second], raw[second + 1 :]
    # the space in front of the literal may join its first character
    assert marked[: first - 1] == left[:-1]
    assert any(marked[i : i + len(middle) - 1] == middle[:-1] for i in range(len(marked)))
    assert marked[-len(right) :] == right


@pytest.mark.parametrize(
    "text",
    ["hello", "  a\n\nb ", "<image", "im_end|>", "< image >", "<<>>", "it's 2 > 1", "日本語 🙂", "a\0b", "x" * 500],
)
def test_text_without_control_tokens_is_the_same_with_sanitizing_on_and_off(text, processor):
    for chat in chats_with(text):
        assert ids_of(processor, chat) == ids_of(processor, chat, sanitize_control_tokens=False)


def test_control_tokens_pass_if_sanitizing_is_off(processor):
    token = processor.tokenizer.eos_token
    control = processor.tokenizer.eos_token_id
    on, off = (ids_of(processor, user(f"a{token}b"), sanitize_control_tokens=s) for s in (True, False))
    assert off.count(control) == on.count(control) + 1


@pytest.mark.parametrize("parts", [("<ima", "ge>"), ("<", "image>"), ("<", "", "image>"), ("<im", "a", "ge>b<image>")])
def test_a_control_token_cannot_be_put_together_from_parts(parts, processor):
    ids = ids_of(processor, user([{"type": "text", "text": part} for part in parts]))
    assert processor.image_token_id not in ids
    assert "".join(parts) in processor.decode(ids)


def test_overlapping_control_tokens_stay_text(processor):
    eos = processor.tokenizer.eos_token
    text = f"{eos[:1]}{eos}{eos[1:]}{eos}{eos}"
    ids, harmless = ids_of(processor, user(text)), ids_of(processor, user("x"))
    assert control_counts(processor, ids) == control_counts(processor, harmless)
    assert text in processor.decode(ids)


def test_placeholder_next_to_a_typed_one_is_the_only_picture(processor):
    picture = Image.new("RGB", (20, 20))
    text = {"type": "text", "text": "<image>"}
    ids = ids_of(processor, user([text, {"type": "image", "image": picture}, text]))
    alone = ids_of(processor, user([{"type": "image", "image": picture}]))
    assert ids.count(processor.image_token_id) == alone.count(processor.image_token_id)


def test_a_direct_prompt_keeps_the_private_use_characters(processor):
    text = f"a{BREAK}b{2 * BREAK}c\U000f0001"
    assert text in processor.decode(processor(text=text)["input_ids"][0])
    # only a rendered chat has breaks in it: a token that is typed here is the token
    eos = processor.tokenizer.eos_token
    ids = processor(text=f"{BREAK}{eos}{BREAK}", add_special_tokens=False)["input_ids"][0]
    assert ids.count(processor.tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    "text", ["", "ab", f"a{BREAK}b", f"<{BREAK}{BREAK}", f"{BREAK}" * 3, f"{BREAK}a{BREAK}{BREAK}"]
)
def test_breaks_can_be_escaped_and_removed(text, processor):
    assert without_breaks(escape_breaks(text)) == text
    ids = [token for token, _ in tokenize(processor.tokenizer, escape_breaks(text), False)]
    assert processor.decode(ids).strip() == text
    removed = break_offsets(escape_breaks(text))
    assert [entry["new_span"][1] - entry["span"][1] for entry in removed] == [-1 - i for i in range(text.count(BREAK))]


def test_offsets_of_a_marked_chat_point_into_the_rendered_text(processor):
    chat = user(f"one </s><|im_end|> two {BREAK}<image> three")
    rendered = processor.apply_chat_template(chat)
    out = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, processor_kwargs={"return_offsets_mapping": True}
    )
    for token, (start, end) in zip(out["input_ids"][0], out["offset_mapping"][0]):
        piece = processor.decode([token])
        if end - start > 1 and "�" not in piece:
            assert rendered[start:end].strip() == piece.strip()


def test_threads_that_share_a_processor_do_not_disturb_each_other(processor):
    chat = user("a <image> b </s><|im_end|><|eot_id|> c " * 3)
    expected, failures = ids_of(processor, chat), []

    def work():
        for _ in range(30):
            try:
                if ids_of(processor, chat) != expected:
                    failures.append("ids")
            except Exception as error:
                failures.append(type(error).__name__)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("unit", ["word ", "<image>", "</s>a\n", BREAK, "\n", "<"])
def test_a_megabyte_of_text_takes_bounded_time(unit, llama):
    size = 1 << 20 if unit in ("word ", "\n", "<") else 1 << 18
    text = unit * (size // len(unit.encode()))
    started = time.perf_counter()
    assert len(ids_of(llama, user(f"a{text}a"))) > 1000
    # quadratic work would take minutes; this is no measurement
    assert time.perf_counter() - started < 30


PIL = Image.open(PICTURE_FILE).convert("RGB")
BASE64 = base64.b64encode(PICTURE_FILE.read_bytes()).decode()
DATA_URI = f"data:image/png;base64,{BASE64}"
SAME_PICTURE = [
    {"type": "image", "image": PIL},
    {"type": "image", "image": np.array(PIL)},
    {"type": "image", "image": str(PICTURE_FILE)},
    {"type": "image", "image": DATA_URI},
    {"type": "image", "path": str(PICTURE_FILE)},
    {"type": "image", "path": PICTURE_FILE},
    {"type": "image", "url": DATA_URI},
    {"type": "image", "url": str(PICTURE_FILE)},
    {"type": "image", "base64": BASE64},
    {"type": "image", "image": PIL, "url": None, "path": None},
    {"type": "image", "image_url": {"url": DATA_URI}},
    {"type": "image_url", "image_url": {"url": DATA_URI}},
    {"type": "image_url", "image_url": {"url": DATA_URI, "detail": "high"}},
    {"type": "image_url", "image_url": DATA_URI},
    {"type": "image_url", "url": DATA_URI},
]


@pytest.mark.parametrize("block", SAME_PICTURE, ids=[f"{b['type']}-{'-'.join(list(b)[1:])}" for b in SAME_PICTURE])
def test_every_form_of_a_source_gives_the_same_inputs(block, llama):
    def inputs(block):
        return llama.apply_chat_template(
            user(["look", block]), tokenize=True, return_dict=True, return_tensors="np", add_generation_prompt=True
        )

    expected, got = inputs(SAME_PICTURE[0]), inputs(block)
    assert got.keys() == expected.keys()
    assert all(np.array_equal(got[key], expected[key]) for key in expected)


def test_strings_among_the_parts_are_text(llama):
    parts = ["a ", {"type": "image", "image": PIL}, {"type": "text", "text": "b"}]
    spelled = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    assert ids_of(llama, user(parts)) == ids_of(llama, user(spelled)) == ids_of(llama, user(tuple(parts)))


IMAGE = {"type": "image", "image": PIL}
BAD_CHATS = {
    "none": (None, "non-empty list"),
    "empty": ([], "non-empty list"),
    "text": ("hello", "non-empty list"),
    "number": (5, "non-empty list"),
    "dictionary": ({"role": "user", "content": "a"}, "non-empty list"),
    "empty second chat": ([user("a"), []], "chat 1"),
    "no second chat": ([user("a"), "b"], "chat 1"),
    "nested too deep": ([[user("a")]], "chat 0, message 0"),
    "message is text": (["hello"], "message 0"),
    "message is none": ([*user("a"), None], "message 1"),
    "no role": ([{"content": "a"}], "message 0: the role"),
    "unknown role": ([{"role": "root", "content": "a"}], "message 0: the role"),
    "unhashable role": ([{"role": ["user"], "content": "a"}], "message 0: the role"),
    "role in second chat": ([user("a"), [{"role": "tool", "content": "a"}]], "chat 1, message 0: the role"),
    "no content": ([{"role": "user"}], "message 0: the content"),
    "content none": (user(None), "message 0: the content"),
    "content number": (user(5), "message 0: the content"),
    "content dictionary": (user({"type": "text", "text": "a"}), "message 0: the content"),
    "block none": (user([None]), "message 0, block 0"),
    "block number": (user(["a", 5]), "message 0, block 1"),
    "block is a picture": (user([PIL]), "message 0, block 0"),
    "no type": (user([{"text": "a"}]), "message 0, block 0: the content type"),
    "unknown type": (user([{"type": "audio", "audio": "a.wav"}]), "message 0, block 0: the content type"),
    "unhashable type": (user([{"type": []}]), "message 0, block 0: the content type"),
    "text none": (user([{"type": "text", "text": None}]), "message 0, block 0: a text block"),
    "text number": (user([{"type": "text", "text": 5}]), "message 0, block 0: a text block"),
    "no text": (user([{"type": "text"}]), "message 0, block 0: a text block"),
    "two sources": (user([{**IMAGE, "path": "a.png"}]), "block 0: give one source, not image and path"),
    "url and image_url": (user([{"type": "image_url", "url": "a", "image_url": {"url": "a"}}]), "give one source"),
    "image_url without url": (user([{"type": "image_url", "image_url": {}}]), "block 0: a picture needs its source"),
    "picture under video": (user([{"type": "image", "video": PIL}]), "block 0: a picture needs its source"),
    "missing video": (user([{"type": "video", "video": "a.mp4"}]), "existing video file"),
    "video without source": (user([{"type": "video"}]), "1 <vila/video> token.* 0 video"),
    "picture without source": (user([{"type": "image"}]), "1 <image> token.* 0 picture"),
    "surrogate": (user("a\ud800b"), "prompt 0 holds half of a surrogate pair"),
    "surrogate in part": ([user("a"), user(["\udfff"])], "prompt 1 holds half of a surrogate pair"),
}


@pytest.mark.parametrize(("chat", "message"), BAD_CHATS.values(), ids=BAD_CHATS.keys())
def test_a_bad_chat_is_a_value_error_that_says_where_and_leaves_the_processor_usable(chat, message, llama):
    good = user([IMAGE, "what?"])
    expected = ids_of(llama, good)
    with pytest.raises(ValueError, match=message) as raised:
        llama.apply_chat_template(chat, tokenize=True, return_dict=True)
    assert "0x" not in str(raised.value)
    assert ids_of(llama, good) == expected


def test_messages_of_the_caller_are_not_changed(processor):
    chat = [
        {"role": "system", "content": "a </s>", "name": None},
        {"role": "user", "content": [IMAGE, {"type": "image_url", "image_url": {"url": DATA_URI}}, "</s>"]},
        {"role": "assistant", "content": [{"type": "text", "text": "<image>", "extra": None}]},
    ]
    kept, shallow = copy.deepcopy(chat), [list(message["content"]) for message in chat]
    options = {"text_kwargs": {"padding": True}, "add_special_tokens": True}
    processor.apply_chat_template(chat, tokenize=True, return_dict=True, processor_kwargs=options)
    processor.apply_chat_template([chat, chat], tokenize=True, return_dict=True)
    processor.apply_chat_template(chat)
    assert chat == kept
    assert [list(message["content"]) for message in chat] == shallow
    assert options == {"text_kwargs": {"padding": True}, "add_special_tokens": True}


@pytest.mark.parametrize("text", ["a\0b", "\0", "\x01\x7f\x1b[2J", "\ufeffa", "\u202eabc", "\u200d"])
def test_control_characters_are_text(text, processor):
    ids = ids_of(processor, user(f"before {text} behind"))
    assert control_counts(processor, ids) == control_counts(processor, ids_of(processor, user("before x behind")))
    assert f"before {text} behind" in processor.decode(ids)


def test_an_empty_message_is_legal(processor):
    assert ids_of(processor, user(""), add_generation_prompt=True)
    assert ids_of(processor, user([]), add_generation_prompt=True) == ids_of(
        processor, user(""), add_generation_prompt=True
    )
