"""Which chat template a converted checkpoint gets, and which tokens end its answers."""

from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .chat_vila import render

TEMPLATE_FOLDER = Path(__file__).parent / "chat_templates"
CONV_MODES = ("auto", "vicuna_v1", "llama_3", "hermes-2", "qwen2", "mistral")
SENTINEL = "<vila/sentinel>"

# Turns the parts of every message into the string that a text-only template expects.
FLATTEN_MESSAGES = """
{%- set flattened = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- set flat = {'role': message['role'], 'content': content_text(message)} -%}
    {%- set flattened.messages = flattened.messages + [flat] -%}
{%- endfor -%}
{%- set messages = flattened.messages %}
"""
PROBES = [
    [{"role": "user", "content": "a"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
]


def named_template(name: str) -> str:
    """A template of this package, with the macro that reads a message's parts."""
    return read_template("_content") + read_template(name)


def read_template(name: str) -> str:
    return (TEMPLATE_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def choose_chat_template(
    conv_mode: str, tokenizer: PreTrainedTokenizerBase, model_type: str | None, source: Path, root: dict[str, Any]
) -> str:
    """The template of a checkpoint.

    Args:
        conv_mode: one of `CONV_MODES`. The remote-code layout brings its own template: `"auto"` and the name that its
            config gives it mean that one. In the research layout `"auto"` is for VILA-1.5's Llama models the template
            that they were trained with, told apart by the tokenizer's control tokens, and for others the tokenizer's.
        model_type: of the language model.
        source: the original folder, `root` its config.

    Raises:
        ValueError: if the mode is unknown, or `"auto"` finds no template.
    """
    if conv_mode not in CONV_MODES:
        raise ValueError(f"unknown conv mode {conv_mode!r}; known are {', '.join(CONV_MODES)}")
    is_remote_layout = root.get("model_type") == "vila"
    if conv_mode != "auto" and not (is_remote_layout and conv_mode == root.get("chat_template")):
        return named_template(conv_mode)
    # configs of VILA-1.5's time lack keys that came with NVILA
    if model_type == "llama" and not is_remote_layout and ("fps" not in root or tokenizer.chat_template is None):
        return named_template(vila15_template_name(tokenizer))
    text_template = tokenizer.chat_template
    if isinstance(text_template, dict):
        text_template = text_template.get("default")
    if text_template is None and is_remote_layout:
        text_template = read_remote_template(source, root.get("chat_template"))
    if text_template is None:
        if model_type in ("qwen2", "mistral"):
            return named_template(model_type)
        raise ValueError("the tokenizer has no chat template: choose one with --conv-mode")
    equivalent = next((name for name in ("qwen2", "mistral") if renders_alike(name, text_template, tokenizer)), None)
    if equivalent is not None:
        return named_template(equivalent)
    return read_template("_content") + FLATTEN_MESSAGES.lstrip("\n") + text_template


def choose_vila_u_template(conv_mode: str) -> str:
    """The template of VILA-U, which is Vicuna's with pictures that are drawn.

    Raises:
        ValueError: if another one is asked for.
    """
    if conv_mode not in ("auto", "vicuna_v1"):
        raise ValueError(f"VILA-U has the template 'vicuna_v1', not {conv_mode!r}")
    return read_template("vila_u")


def vila15_template_name(tokenizer: PreTrainedTokenizerBase) -> str:
    vocabulary = tokenizer.get_vocab()
    if "<|start_header_id|>" in vocabulary:
        return "llama_3"
    return "hermes-2" if "<|im_start|>" in vocabulary else "vicuna_v1"


def read_remote_template(source: Path, name: Any) -> str | None:
    """The `<name>.jinja` of a remote-code folder, flattened as that code does it."""
    if not isinstance(name, str) or not (source / f"{name}.jinja").is_file():
        return None
    return (source / f"{name}.jinja").read_text(encoding="utf-8").replace("    ", "").replace("\n", "")


def renders_alike(name: str, text_template: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a template of this package writes the same text; ours also marks what the assistant wrote."""
    try:
        return all(
            render(probe, named_template(name), tokenizer.special_tokens_map, prompt)
            == render(probe, text_template, tokenizer.special_tokens_map, prompt)
            for probe in PROBES
            for prompt in (False, True)
        )
    except (TemplateError, TypeError):
        return False


def stop_token_ids(template: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """EOS and every control token that the template puts behind an assistant's text."""
    chat = [{"role": role, "content": text} for role, text in (("user", "question"), ("assistant", SENTINEL))] * 10
    ids = tokenizer(render(chat, template, tokenizer.special_tokens_map))["input_ids"]
    sentinel, control = tokenizer.convert_tokens_to_ids(SENTINEL), set(tokenizer.added_tokens_decoder)
    behind = {after for token, after in pairwise(ids) if token == sentinel}
    return [tokenizer.eos_token_id, *sorted((behind & control) - {tokenizer.eos_token_id})]


def user_end_ids(template: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the template puts between the end of the user's text and the answer, without blanks at its ends."""
    rendered = render([{"role": "user", "content": SENTINEL}], template, tokenizer.special_tokens_map, True)
    behind = rendered.rsplit(SENTINEL, 1)[-1].strip()
    return tokenizer(behind, add_special_tokens=False)["input_ids"]
