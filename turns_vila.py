"""A chat's next turn: the ids and media that the cache of the turns before does not hold.

- Earlier messages are neither tokenized nor are their media read again. The answer in the cache stays the ids that the
  model wrote, which its text may not give back when it is tokenized.
- The chat template writes the whole chat; what counts is what it writes behind the last answer.
"""

from collections.abc import Mapping
from secrets import token_hex
from typing import Any

import torch
from transformers import BatchFeature
from transformers.utils import logging

from .chat_vila import BREAK, check_message, map_chats

logger = logging.get_logger(__name__)


class VilaTurns:
    """What `VilaProcessor` adds to continue chats."""

    tokenizer: Any
    apply_chat_template: Any

    def continue_chat(
        self,
        conversation: list,
        inputs: Mapping[str, Any],
        output: Any,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """The inputs of the next turn, for `generate(**inputs, past_key_values=cache)` with the cache of the last one.

        Args:
            conversation: the chat, or chats, from the beginning: up to the last answer as before, then what is new.
            inputs: what the last `generate()` was called with.
            output: what it returned, one row per chat.
            processor_kwargs, kwargs: as of `apply_chat_template`.

        Returns:
            `input_ids`, `(chats, new tokens)`; `attention_mask`, `(chats, all tokens)`; pixels of the new media.

        Raises:
            ValueError: if there is nothing behind an assistant's message, or inputs and output do not belong together.
        """
        if kwargs.get("return_assistant_tokens_mask"):
            raise ValueError("continue_chat marks no assistant tokens: earlier ones are not in its ids")
        prompts = torch.as_tensor(inputs["input_ids"])
        sequences = torch.as_tensor(getattr(output, "sequences", output))
        written = sequences[:, prompts.shape[1] :].to(prompts.device)
        if len(sequences) != len(prompts) or not written.shape[1] or not sequences_begin(sequences, prompts):
            raise ValueError("the output must be what generate() made of these inputs, one row for each")
        marker = token_hex(16)
        chats = map_chats(conversation, check_message)
        is_batch = isinstance(chats[0], list)
        marked = [mark_answer(chat, marker) for chat in (chats if is_batch else [chats])]
        if len(marked) != len(prompts):
            raise ValueError(f"there are {len(marked)} chats, but inputs of {len(prompts)}")
        for chat, ids in zip(chats if is_batch else [chats], written):
            self._warn_of_other_answer(chat, ids)
        ways = {"add_generation_prompt": True, **kwargs, "tokenize": True, "return_dict": True, "return_tensors": None}
        options = {**(processor_kwargs or {}), "behind": marker, "padding": False}
        data = self.apply_chat_template(marked, **ways, processor_kwargs=options)
        rows = [self._next_row(ids.tolist(), new) for ids, new in zip(written, data.pop("input_ids"))]
        cached_mask = inputs.get("attention_mask")
        cached_mask = torch.ones_like(prompts) if cached_mask is None else torch.as_tensor(cached_mask)
        longest = max(len(new) for _, new in rows)
        answer_mask = [[1] * kept + [0] * (written.shape[1] - 1 - kept) for kept, _ in rows]
        new_mask = [[0] * (longest - len(new)) + [1] * len(new) for _, new in rows]
        filler = self.tokenizer.pad_token_id or 0
        data["input_ids"] = torch.tensor([[filler] * (longest - len(new)) + new for _, new in rows])
        later = torch.tensor([answer + new for answer, new in zip(answer_mask, new_mask)], dtype=cached_mask.dtype)
        data["attention_mask"] = torch.cat([cached_mask, later.to(cached_mask.device)], dim=1)
        return BatchFeature(data, tensor_type="pt").to(prompts.device)

    def _warn_of_other_answer(self, chat: list[dict], written: torch.Tensor) -> None:
        """Says so where the chat's last answer is not what was generated: turns between them would be missing."""
        (content,) = [message["content"] for message in chat if message.get("role") == "assistant"][-1:]
        blocks = [content] if isinstance(content, str) else [block.get("text", "") for block in content]
        if "".join(blocks).split() != self.tokenizer.decode(written, skip_special_tokens=True).split():
            logger.warning(
                "continue_chat: the last answer in the chat differs from the generated one, which the model sees"
            )

    def _next_row(self, written: list[int], new: list[int]) -> tuple[int, list[int]]:
        """Tokens of an answer that the cache holds, and the ids of the next turn: the cache lacks the last token."""
        stops = {new[0], self.tokenizer.eos_token_id}
        end = next((index for index, token in enumerate(written) if token in stops), len(written))
        if end == len(written):  # cut off
            return end - 1, [written[-1], *new]
        if end < len(written) - 1 and written[end] == new[0]:  # before the others of its batch
            return end + 1, new[1:]
        return end, new


def sequences_begin(sequences: torch.Tensor, prompts: torch.Tensor) -> bool:
    """Whether every sequence begins with its prompt."""
    return torch.equal(sequences[:, : prompts.shape[1]].to(prompts.device), prompts)


def mark_answer(chat: list[dict], marker: str) -> list[dict]:
    """The chat with a marker in place of its last answer.

    Raises:
        ValueError: if there is none, or nothing behind it.
    """
    answers = [index for index, message in enumerate(chat) if message.get("role") == "assistant"]
    if not answers or answers[-1] == len(chat) - 1:
        raise ValueError("a chat is continued by messages behind the assistant's last answer: there are none")
    answer = {"role": "assistant", "content": [{"type": "text", "text": marker}]}
    return [*chat[: answers[-1]], answer, *chat[answers[-1] + 1 :]]


def behind_marker(marker: str, prompts: list[str]) -> tuple[list[str], list[str]]:
    """What stands before the marker in every prompt, and behind it: the beginning of no text.

    Raises:
        ValueError: if a prompt lacks it.
    """
    parts = [prompt.rpartition(marker) for prompt in prompts]
    if not all(found for _, found, _ in parts):
        raise ValueError("the chat template leaves the last answer out: pass the whole chat instead")
    return [head for head, _, _ in parts], [BREAK + tail for _, _, tail in parts]


def drop_first(media: list[list], heads: list[str], token: str) -> list[list]:
    """The media of every prompt without those whose tokens stand in its head."""
    return [row[head.count(token) :] for row, head in zip(media, heads)]
