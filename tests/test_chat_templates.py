"""Chat templates: how they place pictures, which one a checkpoint gets, and which tokens end an answer."""

import copy

import pytest
from conftest import COMMITTED_GOLDENS
from jinja2 import TemplateError
from vila.chat_templates_vila import CONV_MODES, choose_chat_template, named_template, stop_token_ids
from vila.chat_vila import message_ends, render
from vila.tokenizer_files_vila import load_tokenizer

NAMES = CONV_MODES[1:]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
FOREIGN = (
    "\n {% if messages[0]['role'] == 'system' %}{{ '<<' + messages[0]['content'] + '>>' }}{% endif %}\n"
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHATS = [
    [{"role": "user", "content": "a"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [{"role": role, "content": role + "\n  <b> 'x'"} for role in ("user", "assistant", "user")],
]


@pytest.fixture(scope="module")
def tokenizers():
    names = ("nvila_lite_image", "vila15_image", "vila15_llama3_image", "remote_vila15_image")
    return {name: load_tokenizer(COMMITTED_GOLDENS / "vila" / name / "checkpoint" / "llm") for name in names}


def choose(conv_mode, tokenizer, model_type, root=None, source=COMMITTED_GOLDENS):
    return choose_chat_template(conv_mode, tokenizer, model_type, source, root or {})


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_parts_of_a_message_render_as_their_concatenation(name, prompt):
    parts = [{"type": "text", "text": " a "}, {"type": "image"}, {"type": "video"}, {"type": "text", "text": "b \n"}]
    in_parts = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "c"}]}]
    as_text = [{"role": "user", "content": "a <image><vila/video>b"}, {"role": "assistant", "content": "c"}]
    template = named_template(name)
    assert render(in_parts, template, TOKENS, prompt) == render(as_text, template, TOKENS, prompt)


@pytest.mark.parametrize("name", NAMES)
def test_generation_prompt_is_what_opens_the_next_answer(name):
    question = [{"role": "user", "content": "a"}]
    opened = render(question, named_template(name), TOKENS, add_generation_prompt=True)
    answered = render([*question, {"role": "assistant", "content": "b"}], named_template(name), TOKENS)
    assert answered.startswith(opened)
    assert answered[len(opened) :].lstrip(" ").startswith("b")


@pytest.mark.parametrize("name", NAMES)
def test_unknown_part_is_refused_without_an_echo(name):
    with pytest.raises(TemplateError, match=r"unknown content type$"):
        render([{"role": "user", "content": [{"type": "secret"}]}], named_template(name), TOKENS)


@pytest.mark.parametrize("name", NAMES)
def test_message_ends_are_what_the_template_writes_behind_a_last_picture(name):
    between, at_end = message_ends(named_template(name), "<image>", "<s>", "</s>")
    chat = [{"role": role, "content": "x<image>"} for role in ("system", "user", "assistant", "user", "user")]
    *inner, last = render(chat, named_template(name), TOKENS, add_generation_prompt=True).split("<image>")[1:]
    assert all(text.startswith(tuple(between)) for text in inner)
    assert last in at_end
    assert not any("hello".startswith(end) for end in between)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{{ messages[0]['content'] + 'x' }}", "{% if", None]
)
def test_message_ends_of_a_template_that_knows_no_parts_are_empty(template):
    assert message_ends(template, "<image>", "", "") == ([], [])


@pytest.mark.parametrize("name", NAMES)
def test_an_explicit_mode_wins(name, tokenizers):
    for tokenizer, model_type in ((tokenizers["nvila_lite_image"], "qwen2"), (tokenizers["vila15_image"], "llama")):
        assert choose(name, tokenizer, model_type) == named_template(name)


@pytest.mark.parametrize(
    ("case", "model_type", "name"),
    [
        ("nvila_lite_image", "qwen2", "qwen2"),
        # a Llama model with ChatML tokens is VILA1.5-40b
        ("nvila_lite_image", "llama", "hermes-2"),
        ("vila15_image", "llama", "vicuna_v1"),
        ("vila15_llama3_image", "llama", "llama_3"),
    ],
)
def test_auto_finds_the_template_of_the_family(case, model_type, name, tokenizers):
    assert choose("auto", tokenizers[case], model_type) == named_template(name)


def test_unknown_mode_is_refused(tokenizers):
    with pytest.raises(ValueError, match="unknown conv mode"):
        choose("vicuna", tokenizers["vila15_image"], "llama")


@pytest.fixture
def foreign(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["nvila_lite_image"])
    tokenizer.chat_template = FOREIGN
    return tokenizer


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("chat", CHATS, ids=["one", "system", "three"])
def test_a_foreign_template_is_wrapped_and_renders_text_chats_the_same(chat, prompt, foreign):
    wrapped = choose("auto", foreign, "qwen2")
    assert wrapped.endswith(FOREIGN)
    assert render(chat, wrapped, TOKENS, prompt) == render(chat, FOREIGN, TOKENS, prompt)


def test_a_wrapped_template_places_pictures(foreign):
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a "}]}]
    assert "[user] <image>a</s>" in render(chat, choose("auto", foreign, "qwen2"), TOKENS)


def test_a_foreign_template_that_writes_the_same_becomes_ours(foreign):
    # only ours marks what the assistant wrote
    foreign.chat_template = (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\n"
        "You are a helpful assistant<|im_end|>\n{% endif %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + "
        "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert choose("auto", foreign, "qwen2") == named_template("qwen2")


def test_the_default_of_several_templates_is_taken(foreign):
    foreign.chat_template = {"default": FOREIGN, "tool_use": "x"}
    assert choose("auto", foreign, "qwen2").endswith(FOREIGN)


@pytest.mark.parametrize(("model_type", "name"), [("qwen2", "qwen2"), ("mistral", "mistral"), ("phi3", None)])
def test_without_a_template_the_model_type_decides(model_type, name, foreign):
    foreign.chat_template = None
    if name is None:
        with pytest.raises(ValueError, match="--conv-mode"):
            choose("auto", foreign, model_type)
    else:
        assert choose("auto", foreign, model_type) == named_template(name)


@pytest.mark.parametrize("conv_mode", ["auto", "vicuna_v1"])
def test_the_remote_layout_keeps_its_own_template(conv_mode, tokenizers):
    tokenizer = copy.deepcopy(tokenizers["remote_vila15_image"])
    tokenizer.chat_template = None
    source = COMMITTED_GOLDENS / "vila" / "remote_vila15_image" / "checkpoint"
    root = {"model_type": "vila", "chat_template": "vicuna_v1"}
    template = choose(conv_mode, tokenizer, "llama", root, source)
    # the remote code writes two spaces where the research code writes one
    assert "USER:  a" in render(CHATS[0], template, TOKENS)
    assert choose("llama_3", tokenizer, "llama", root, source) == named_template("llama_3")


@pytest.mark.parametrize(
    ("case", "name", "expected"),
    [
        ("nvila_lite_image", "qwen2", ["<|im_end|>"]),
        ("nvila_lite_image", "hermes-2", ["<|im_end|>"]),
        ("vila15_image", "vicuna_v1", ["</s>"]),
        ("vila15_image", "mistral", ["</s>"]),
        ("vila15_llama3_image", "llama_3", ["<|end_of_text|>", "<|eot_id|>"]),
        # vicuna's "</s>" is plain text here: what follows an answer may end one only if it is a control token
        ("nvila_lite_image", "vicuna_v1", ["<|im_end|>"]),
    ],
)
def test_stop_tokens_are_eos_and_the_control_tokens_behind_an_answer(case, name, expected, tokenizers):
    ids = stop_token_ids(named_template(name), tokenizers[case])
    assert [tokenizers[case].decode([token]) for token in ids] == expected
