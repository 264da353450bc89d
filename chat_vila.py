"""The text side of a chat: checking messages, keeping typed control tokens literal, and tokenizing with offsets."""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import accumulate, groupby, pairwise, takewhile
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

ROLES = ("system", "user", "assistant")
CONTENT_TYPES = ("text", "image", "image_url", "video")
MEDIA_KEYS = ("image", "url", "path", "base64", "image_url", "video")

# A private-use character behind the first character of a control token that a user typed: the text is tokenized in
# pieces that end there. One that a user typed is doubled first, so that it cannot be forged and is not lost.
BREAK = "\U000f0000"
SINGLE_BREAK = re.compile(f"(?<!{BREAK}){BREAK}(?!{BREAK})")

Offset = tuple[int, int]


def escape_breaks(text: str) -> str:
    """The text as `tokenize` reads it, if it holds no break."""
    return text.replace(BREAK, 2 * BREAK)


def without_breaks(text: str) -> str:
    """The text as its author typed it."""
    return SINGLE_BREAK.sub("", text).replace(2 * BREAK, BREAK)


def break_offsets(text: str) -> list[dict[str, Offset]]:
    """Where removing the breaks shortens the text, in the form that `ProcessorMixin` maps assistant masks with."""
    removed = [match.start() for match in re.finditer(f"{BREAK}{BREAK}?", text)]
    return [{"span": (at, at + 1), "new_span": (at - count, at - count)} for count, at in enumerate(removed)]


def check_prompts(text: Any) -> list[str]:
    """One or several prompts as a list.

    Raises:
        ValueError: if they are no strings, there is none, or one is no valid Unicode.
    """
    prompts = [text] if isinstance(text, str) else text
    is_list = isinstance(prompts, (list, tuple)) and len(prompts) > 0
    if not is_list or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("text must be a string or a non-empty list of strings")
    for row, prompt in enumerate(prompts):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"prompt {row} holds half of a surrogate pair, which is no character") from error
    return list(prompts)


def map_chats(conversation: Any, change: Callable[[dict, str], dict]) -> list:
    """Applies `change(message, place)` to every message of one chat or of a batch of chats, which are copied.

    Raises:
        ValueError: if this is no chat, is empty, or a message is not a dictionary.
    """
    if isinstance(conversation, (list, tuple)) and conversation and isinstance(conversation[0], (list, tuple)):
        return [map_chat(chat, change, f"chat {index}, ") for index, chat in enumerate(conversation)]
    return map_chat(conversation, change)


def map_chat(chat: Any, change: Callable[[dict, str], dict], place: str = "") -> list[dict]:
    """One chat of `map_chats`."""
    if not isinstance(chat, (list, tuple)) or not chat:
        raise ValueError(f"{place}a chat must be a non-empty list of messages, or a list of such lists")
    for index, message in enumerate(chat):
        if not isinstance(message, dict):
            raise ValueError(f"{place}message {index} must be a dictionary, got {type(message).__name__}")
    return [change(message, f"{place}message {index}") for index, message in enumerate(chat)]


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
    return block if kind == "video" else image_block(block, place)


def image_block(block: dict, place: str) -> dict:
    """A picture's block, OpenAI's `image_url` form included, in the form of transformers."""
    source = block.get("image_url")
    if isinstance(source, dict):
        source = source.get("url")
    if (source is None and "image_url" in block) or "video" in block:
        raise ValueError(f"{place}: a picture needs its source under 'image', 'url', 'path', 'base64' or 'image_url'")
    picture = {key: value for key, value in block.items() if key != "image_url"}
    return {**picture, "type": "image", **({} if source is None else {"url": source})}


def mark_literals(message: dict, control_tokens: re.Pattern[str] | None) -> dict:
    """Puts breaks into the control tokens in the message's text, so that `tokenize` reads them as characters."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": break_texts([content], control_tokens)[0]}
    marked = []
    for is_text, group in groupby(content, key=lambda block: block["type"] == "text"):
        blocks = list(group)
        if is_text:
            texts = break_texts([block["text"] for block in blocks], control_tokens)
            blocks = [{**block, "text": text} for block, text in zip(blocks, texts)]
        marked += blocks
    return {**message, "content": marked}


def break_texts(texts: list[str], control_tokens: re.Pattern[str] | None) -> list[str]:
    """Texts that follow each other, with breaks in the control tokens; one may be spread over several of them."""
    texts = [escape_breaks(text) for text in texts]
    if control_tokens is None:
        return texts
    joined = "".join(texts)
    starts = [match.start() for match in control_tokens.finditer(joined)]
    broken = control_tokens.sub(rf"\g<0>{BREAK}", joined)
    # a text that ends behind the first character of a control token keeps the break that follows that character
    ends = [end + bisect_left(starts, end) for end in accumulate(map(len, texts))]
    return [broken[start:end] for start, end in pairwise([0, *ends])]


def control_token_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches the first character of each of the tokenizer's special tokens."""
    tokens = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile(f"(?=(?:{'|'.join(tokens)})).", re.DOTALL) if tokens else re.compile("(?!)")


def tokenize(tokenizer: Any, text: str, add_special_tokens: bool) -> Iterator[tuple[int, Offset]]:
    """Ids with their character offsets in `without_breaks(text)`."""
    first, *rest = [piece.replace(2 * BREAK, BREAK) for piece in SINGLE_BREAK.split(text)]
    yield from encode(tokenizer, [first], add_special_tokens)[0]
    starts = accumulate(map(len, rest), initial=len(first))
    for position, encoded in zip(starts, encode_continuations(tokenizer, rest)):
        yield from ((token, (start + position, end + position)) for token, (start, end) in encoded)


def encode(tokenizer: Any, texts: list[str], add_special_tokens: bool = False) -> list[list[tuple[int, Offset]]]:
    """Ids and offsets of every text."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    return [list(zip(ids, offsets)) for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"])]


def encode_continuations(tokenizer: Any, pieces: list[str]) -> Iterator[list[tuple[int, Offset]]]:
    """Pieces from the middle of a text.

    They are encoded behind a line break that is removed again: sentencepiece adds a space at the start of a text.
    """
    lead, *encoded_pieces = encode(tokenizer, ["\n", *("\n" + piece for piece in pieces)])
    lead_ids = [token for token, _ in lead]
    for piece, encoded in zip(pieces, encoded_pieces):
        if [token for token, _ in encoded[: len(lead)]] == lead_ids:
            yield [(token, (max(start - 1, 0), max(end - 1, 0))) for token, (start, end) in encoded[len(lead) :]]
        else:
            yield encode(tokenizer, [piece])[0]


def render(chat: list[dict], chat_template: str, tokens: dict[str, Any], add_generation_prompt: bool = False) -> str:
    """One chat as the template writes it; `tokens` are the tokenizer's special tokens by name."""
    options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, **tokens}
    rendered: Any = render_jinja_template([chat], chat_template=chat_template, **options)
    return rendered[0][0]


@lru_cache(maxsize=16)
def message_ends(chat_template: str | None, media_token: str, bos_token: str, eos_token: str) -> tuple[list, list]:
    """What a chat template writes behind a medium that ends its message.

    Returns what stands there between messages, and what stands there at the end of a chat.
    """
    if chat_template is None:
        return [], []

    def behind_medium(before: list[str], after: list[str], add_generation_prompt: bool = False) -> str:
        chat = [{"role": role, "content": [{"type": "image"}]} for role in before + after]
        tokens = {"bos_token": bos_token, "eos_token": eos_token}
        return render(chat, chat_template, tokens, add_generation_prompt).split(media_token)[len(before)]

    between, at_end = [], []
    for before in (["system"], ["user"], ["user", "assistant"]):
        # templates may refuse an order of roles; one of the caller's own may not know this form of a message at all
        for role, next_role in (("system", "user"), ("user", "assistant"), ("assistant", "user")):
            with suppress(TemplateError, ValueError, IndexError, TypeError):
                # the last message of a chat may get a text of its own: keep what stands there in either case
                ends = [behind_medium(before, after) for after in ([role], [role, next_role])]
                same = takewhile(lambda pair: pair[0] == pair[1], zip(*ends))
                between.append("".join(left for left, _ in same))
        for add_generation_prompt in (False, True):
            with suppress(TemplateError, ValueError, IndexError, TypeError):
                at_end.append(behind_medium(before, [], add_generation_prompt))
    return [end for end in between if end.strip()], [end for end in at_end if end.strip()]
