"""The text side of a chat: checking messages, keeping typed control tokens literal, and tokenizing with offsets."""

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

ROLES = ("system", "user", "assistant")
CONTENT_TYPES = ("text", "image", "image_url", "video")
MEDIA_KEYS = ("image", "url", "path", "base64", "image_url", "video")

# Private-use characters around a control token that a user typed. They are stripped from all input first, so that
# they cannot be forged.
LITERAL_START, LITERAL_END = "\U000f0000", "\U000f0001"
LITERAL = re.compile(f"{LITERAL_START}(.*?){LITERAL_END}", re.DOTALL)

Offset = tuple[int, int]


def without_literals(text: str) -> str:
    """The text without what a user typed that looks like a control token."""
    return LITERAL.sub("", text)


def map_chats(conversation: Any, change: Callable[[dict, str], dict]) -> list:
    """Applies `change(message, place)` to every message of one chat or of a batch of chats, which are copied.

    Raises:
        ValueError: if this is no chat, is empty, or a message is not a dictionary.
    """
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise ValueError("a chat must be a non-empty list of messages, or a list of such lists")
    if isinstance(conversation[0], (list, tuple)):
        return [
            map_chats(chat, lambda message, place, index=index: change(message, f"chat {index}, {place}"))
            for index, chat in enumerate(conversation)
        ]
    for index, message in enumerate(conversation):
        if not isinstance(message, dict):
            raise ValueError(f"message {index} must be a dictionary, got {type(message).__name__}")
    return [change(message, f"message {index}") for index, message in enumerate(conversation)]


def check_message(message: dict, place: str) -> dict:
    """A copy of the message without empty keys.

    Raises:
        ValueError: for an unknown role or content type, content that is no text, or two sources in one block.
    """
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{place}: the role must be one of {', '.join(ROLES)}")
    if isinstance(content, str):
        return dict(message)
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"{place}: the content must be a string or a list, got {type(content).__name__}")
    return {**message, "content": [check_block(block, f"{place}, block {i}") for i, block in enumerate(content)]}


def check_block(block: Any, place: str) -> dict:
    """One part of a message, see `check_message`."""
    if isinstance(block, str):
        return {"type": "text", "text": block}
    kind = block.get("type") if isinstance(block, dict) else None
    if kind not in CONTENT_TYPES:
        raise ValueError(f"{place}: the content type must be one of {', '.join(CONTENT_TYPES)}")
    block = {key: value for key, value in block.items() if value is not None}
    if kind == "text":
        if not isinstance(block.get("text"), str):
            raise ValueError(f"{place}: a text block needs a string under 'text'")
        return block
    sources = [key for key in MEDIA_KEYS if key in block]
    if len(sources) > 1:
        raise ValueError(f"{place}: give one source, not {' and '.join(sources)}")
    return block


def mark_literals(message: dict, control_tokens: re.Pattern[str]) -> dict:
    """Wraps the control tokens in the message's text in markers that `tokenize` reads."""

    def mark(text: str) -> str:
        text = text.replace(LITERAL_START, "").replace(LITERAL_END, "")
        return control_tokens.sub(rf"{LITERAL_START}\g<0>{LITERAL_END}", text)

    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": mark(content)}
    return {**message, "content": [{**b, "text": mark(b["text"])} if b["type"] == "text" else b for b in content]}


def control_token_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches the tokenizer's special tokens, longer ones first."""
    tokens = sorted((t.content for t in tokenizer.added_tokens_decoder.values() if t.special), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def tokenize(tokenizer: Any, text: str, add_special_tokens: bool) -> Iterator[tuple[int, Offset]]:
    """Ids with their character offsets in `text`; marked control tokens are encoded as ordinary characters."""
    position = 0
    for index, piece in enumerate(LITERAL.split(text)):
        is_literal = index % 2 == 1
        position += is_literal
        if index == 0:
            yield from encode(tokenizer, piece, add_special_tokens=add_special_tokens)
        elif piece:
            yield from encode_continuation(tokenizer, piece, position, is_literal)
        position += len(piece) + is_literal


def encode(tokenizer: Any, text: str, **kwargs: Any) -> list[tuple[int, Offset]]:
    encoded = tokenizer(text, return_offsets_mapping=True, **kwargs)
    return list(zip(encoded["input_ids"], encoded["offset_mapping"]))


def encode_continuation(tokenizer: Any, piece: str, position: int, is_literal: bool) -> Iterator[tuple[int, Offset]]:
    """A piece from the middle of a text, which starts at character `position`.

    It is encoded behind a line break that is removed again: sentencepiece adds a space at the start of a text.
    """
    kwargs = {"add_special_tokens": False, "split_special_tokens": is_literal}
    lead = encode(tokenizer, "\n", **kwargs)
    encoded, skipped = encode(tokenizer, "\n" + piece, **kwargs), 1
    if [token for token, _ in encoded[: len(lead)]] == [token for token, _ in lead]:
        encoded = encoded[len(lead) :]
    else:
        encoded, skipped = encode(tokenizer, piece, **kwargs), 0
    for token, (start, end) in encoded:
        yield token, (max(start - skipped, 0) + position, max(end - skipped, 0) + position)


def render(chat: list[dict], chat_template: str, tokens: dict[str, str], add_generation_prompt: bool = False) -> str:
    """One chat as the template writes it; `tokens` are the tokenizer's special tokens by name."""
    rendered, _ = render_jinja_template(
        [chat], chat_template=chat_template, add_generation_prompt=add_generation_prompt, **tokens
    )
    return rendered[0]


@lru_cache(maxsize=16)
def message_ends(chat_template: str | None, media_token: str, bos_token: str, eos_token: str) -> tuple[list, list]:
    """What a chat template writes behind a medium that ends its message.

    Returns what stands there between messages, and what stands there at the end of a chat without a generation prompt.
    """
    if chat_template is None:
        return [], []

    def behind_media(roles: list[str], add_generation_prompt: bool) -> list[str]:
        chat = [{"role": role, "content": [{"type": "image"}]} for role in roles]
        tokens = {"bos_token": bos_token, "eos_token": eos_token}
        return render(chat, chat_template, tokens, add_generation_prompt).split(media_token)[1:]

    try:
        user, assistant, prompt = behind_media(["user", "assistant", "user"], True)
        at_end = [behind_media(["user"], False)[-1], behind_media(["user", "assistant"], False)[-1]]
    except (TemplateError, ValueError, IndexError):
        # a template of the caller's own that does not know this form: pictures then end nowhere but at the end
        return [], []
    common = "".join(left for left, right in takewhile(lambda pair: pair[0] == pair[1], zip(user, prompt)))
    return [end for end in (common, assistant) if end.strip()], [end for end in at_end if end.strip()]
