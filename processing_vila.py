"""Chats -> `input_ids` with one placeholder per feature row, and pixels.

- The text is tokenized once; then, on ids, every image token becomes the block that the original splices in: start
  ids, placeholders, end ids. The model inserts nothing.
- Text of the user stays text: control tokens that are typed in a message are encoded as ordinary characters.
- Inserted ids have the character offset (0, 0), so that assistant masks cover what the assistant wrote and no picture.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import MultiModalData, ProcessingKwargs
from transformers.utils import logging

from .chat_vila import (
    Offset,
    break_offsets,
    check_message,
    control_token_pattern,
    escape_breaks,
    map_chats,
    mark_literals,
    message_ends,
    tokenize,
    without_breaks,
)
from .geometry_vila import TileGrid, num_image_tokens, num_tiles
from .image_processing_vila import VilaImagesKwargs, group_by_conversation

logger = logging.get_logger(__name__)

UNSUPPORTED_TEXT_OPTIONS = (
    "text_pair",
    "text_target",
    "text_pair_target",
    "is_split_into_words",
    "stride",
    "return_overflowing_tokens",
    "return_special_tokens_mask",
    "return_token_type_ids",
    "return_length",
)


class VilaProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: VilaImagesKwargs  # type: ignore[misc]


class EncodedPrompt(NamedTuple):
    """One prompt, pictures expanded; the three lists are parallel."""

    ids: list[int]
    offsets: list[Offset]
    types: list[int]


class VilaProcessor(ProcessorMixin):
    r"""
    Args:
        image_processor: a `VilaImageProcessor`.
        tokenizer: the language model's tokenizer, with the media tokens added.
        chat_template: jinja template.
        num_tile_tokens: feature rows of one tile (static S2: of one picture; dynamic S2: of one block).
        s2_output_scale: the scale whose map size dynamic S2 resizes to (`s2_resize_output_to_scale_idx`).
        image_start_tokens: text that is tokenized, with the tokenizer's special tokens, and put before every view.
        image_end_tokens: the same behind every view. With a Llama tokenizer that adds a BOS each time, as the original
            inference code does; `None` gives the bare views of older training code.
    """

    valid_processor_kwargs = VilaProcessorKwargs  # type: ignore[assignment]
    image_token = "<image>"
    video_token = "<vila/video>"
    text_kwargs = {"padding": True, "padding_side": "left"}

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_tile_tokens: int = 256,
        s2_output_scale: int = 0,
        image_start_tokens: str | None = None,
        image_end_tokens: str | None = "\n",
    ):
        if isinstance(num_tile_tokens, bool) or not isinstance(num_tile_tokens, int) or num_tile_tokens < 1:
            raise ValueError("num_tile_tokens must be a positive whole number")
        self.num_tile_tokens = num_tile_tokens
        self.s2_output_scale = s2_output_scale
        self.image_start_tokens = image_start_tokens
        self.image_end_tokens = image_end_tokens
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        for token in (self.image_token, self.video_token):
            if token not in tokenizer.get_added_vocab():
                raise ValueError(f"the tokenizer lacks the media token {token!r}: convert the checkpoint first")
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        *,
        rendered_special_tokens: bool | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tokenizes prompts and cuts their pictures.

        Args:
            images: pictures in the order of the `<image>` tokens; a flat list or one list per prompt.
            text: one or several prompts with one `<image>` per picture.
            rendered_special_tokens: overrides `add_special_tokens`; set by `apply_chat_template`.
            kwargs: options of the tokenizer and of `VilaImageProcessor`.

        Returns:
            `input_ids` and `attention_mask`, `(prompts, sequence)`, and with pictures `pixel_values` and
            `image_grid_thw`, see `VilaImageProcessor`.

        Raises:
            ValueError: if pictures and `<image>` tokens differ in number, a prompt is no text or has no tokens, an
                option has the wrong type, or a prompt is truncated inside a picture.
        """
        if videos is not None or kwargs.pop("audio", None) is not None:
            raise ValueError("this processor takes pictures and text, no video or audio")
        prompts = check_prompts(text)
        if rendered_special_tokens is None:
            # only `apply_chat_template` puts breaks into a text: here they are characters like others
            prompts = [escape_breaks(prompt) for prompt in prompts]
        merged = self._merge_kwargs(VilaProcessorKwargs, self.tokenizer.init_kwargs, **kwargs)
        text_kwargs, images_kwargs = merged["text_kwargs"], merged["images_kwargs"]
        for name in ("return_mm_token_type_ids", "return_text_replacement_offsets"):
            text_kwargs.setdefault(name, merged[name])
        if rendered_special_tokens is not None:
            text_kwargs["add_special_tokens"] = rendered_special_tokens

        image_data, grids = self._process_pictures(images, prompts, images_kwargs)
        add_special_tokens = text_kwargs.get("add_special_tokens", True)
        rows = [self._encode(prompt, row, add_special_tokens) for prompt, row in zip(prompts, grids)]
        for number, row in enumerate(rows):
            if not row.ids:
                raise ValueError(f"prompt {number} has no tokens")
        text_data = self._batch(rows, **text_kwargs)
        if text_kwargs["return_text_replacement_offsets"]:
            text_data["text_replacement_offsets"] = [break_offsets(prompt) for prompt in prompts]
        return BatchFeature(
            {**text_data, **image_data},
            tensor_type=text_kwargs.get("return_tensors"),
            skip_tensor_conversion=self.skip_tensor_conversion,
        )

    def _merge_kwargs(self, *args: Any, **kwargs: Any) -> dict[str, dict]:
        try:
            return super()._merge_kwargs(*args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(str(error)) from error

    def _process_pictures(
        self, images: Any, prompts: list[str], images_kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], list[list[TileGrid]]]:
        """Pixels of all pictures, and the grids of each prompt's pictures."""
        counts = [prompt.count(self.image_token) for prompt in prompts]
        if videos := sum(prompt.count(self.video_token) for prompt in prompts):
            raise ValueError(f"the text has {videos} {self.video_token} token(s), but no video was given")
        given = [] if images is None else group_by_conversation(self.image_processor.fetch_images(images))
        pictures = [picture for conversation in given for picture in conversation]
        if len(given) == len(prompts):
            for row, (conversation, count) in enumerate(zip(given, counts)):
                if len(conversation) != count:
                    raise ValueError(
                        f"prompt {row} has {count} {self.image_token} token(s), but {len(conversation)} picture(s)"
                    )
        elif len(given) > 1:
            raise ValueError(f"there are {len(prompts)} prompt(s), but {len(given)} lists of pictures")
        if len(pictures) != sum(counts):
            raise ValueError(
                f"the text has {sum(counts)} {self.image_token} token(s), but {len(pictures)} picture(s) were given"
            )
        if not pictures:
            return {}, [[] for _ in prompts]
        remaining = iter(pictures)
        conversations = [[next(remaining) for _ in range(count)] for count in counts if count]
        data = self.image_processor(conversations, **{**images_kwargs, "return_tensors": None})
        grids = iter([TileGrid(int(rows), int(cols)) for _, rows, cols in data["image_grid_thw"]])
        return dict(data), [[next(grids) for _ in range(count)] for count in counts]

    def image_block(self, grid: TileGrid) -> list[int]:
        """The ids that replace one image token: every view between its start and end ids, tiles on separate lines."""
        start, end = self._wrapping_ids(self.image_start_tokens), self._wrapping_ids(self.image_end_tokens)
        if grid.area == 1 or self._dynamic_scales:
            rows = num_image_tokens(grid, self.num_tile_tokens, self._dynamic_scales, self.s2_output_scale)
            return start + [self.image_token_id] * rows + end
        line_break = tokenize(self.tokenizer, f"{self.image_token}\n{self.image_token}", add_special_tokens=False)
        separator = [token for token, _ in line_break][1:-1]
        view = start + [self.image_token_id] * self.num_tile_tokens + end
        return (view + separator) * (num_tiles(grid) - 1) + view

    def _wrapping_ids(self, text: str | None) -> list[int]:
        return self.tokenizer(text)["input_ids"] if text else []

    @property
    def _dynamic_scales(self) -> list[int] | None:
        return self.image_processor.s2_scales if self.image_processor.image_mode == "dynamic_s2" else None

    def _encode(self, prompt: str, grids: list[TileGrid], add_special_tokens: bool) -> EncodedPrompt:
        """One prompt -> its ids, offsets in the prompt as it was typed, and token types (1: picture)."""
        text, breaks = self._add_tile_breaks(prompt, grids)
        encoded = EncodedPrompt([], [], [])
        pictures = iter(grids)
        for token, (start, end) in tokenize(self.tokenizer, text, add_special_tokens):
            is_picture = token == self.image_token_id
            ids = self.image_block(next(pictures)) if is_picture else [token]
            # the line breaks added for tiles do not exist in the caller's prompt
            offset = (start - bisect_left(breaks, start), end - bisect_left(breaks, end))
            if is_picture or offset[0] == offset[1]:
                offset = (0, 0)
            encoded.ids.extend(ids)
            encoded.offsets.extend([offset] * len(ids))
            encoded.types.extend([int(is_picture)] * len(ids))
        return encoded

    def _add_tile_breaks(self, prompt: str, grids: list[TileGrid]) -> tuple[str, list[int]]:
        """Adds the line break that the original puts behind the last tile, unless the picture ends its message.

        Returns the text and the positions of the added characters in it, not counting the breaks in typed tokens.
        """
        if self._dynamic_scales or all(grid.area == 1 for grid in grids):
            return prompt, []
        first, *rest = prompt.split(self.image_token)
        text, breaks = first, []
        for index, (following, grid) in enumerate(zip(rest, grids)):
            text += self.image_token
            if grid.area > 1 and not self._ends_message(following, is_last=index == len(rest) - 1):
                breaks.append(len(without_breaks(text)))
                text += "\n"
            text += following
        return text, breaks

    def _ends_message(self, following: str, is_last: bool) -> bool:
        """Whether what follows a picture was written by the chat template and not in the picture's message."""
        tokenizer = self.tokenizer
        template = self.chat_template if isinstance(self.chat_template, str) else None
        special_tokens = (tokenizer.bos_token or "", tokenizer.eos_token or "")
        between, at_end = message_ends(template, self.image_token, *special_tokens)
        return following.startswith(tuple(between)) or (is_last and (following in at_end or not following.strip()))

    def _batch(
        self,
        rows: list[EncodedPrompt],
        padding: Any = True,
        padding_side: str = "left",
        max_length: int | None = None,
        truncation: Any = None,
        pad_to_multiple_of: int | None = None,
        return_offsets_mapping: bool = False,
        return_mm_token_type_ids: bool = False,
        return_attention_mask: bool | None = True,
        **kwargs: Any,
    ) -> dict[str, list]:
        """Truncates and pads the prompts to equal length."""
        if ignored := [name for name in UNSUPPORTED_TEXT_OPTIONS if kwargs.get(name)]:
            logger.warning_once(f"This processor ignores the text options {', '.join(ignored)}.")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        if truncation and truncation != "do_not_truncate":
            rows = [self._truncate(row, max_length or self.tokenizer.model_max_length) for row in rows]
        data = dict(
            self.tokenizer.pad(
                {"input_ids": [row.ids for row in rows]},
                padding=padding,
                padding_side=padding_side,
                max_length=max_length if padding == "max_length" else None,
                pad_to_multiple_of=pad_to_multiple_of,
                return_attention_mask=return_attention_mask is not False,
            )
        )

        def pad(values: list[list], filler: Any) -> list[list]:
            missing = [[filler] * (len(ids) - len(row)) for ids, row in zip(data["input_ids"], values)]
            return [fill + row if padding_side == "left" else row + fill for fill, row in zip(missing, values)]

        if return_offsets_mapping:
            data["offset_mapping"] = pad([row.offsets for row in rows], (0, 0))
        if return_mm_token_type_ids:
            data["mm_token_type_ids"] = pad([row.types for row in rows], 0)
        return data

    def _truncate(self, row: EncodedPrompt, max_length: int) -> EncodedPrompt:
        """Cuts a prompt on the tokenizer's truncation side, never through a picture."""
        excess = len(row.ids) - max_length
        if excess <= 0:
            return row
        keep = slice(max_length) if self.tokenizer.truncation_side == "right" else slice(excess, None)
        if sum(row.types) != sum(row.types[keep]):
            raise ValueError(
                f"truncation to {max_length} tokens would cut into a picture; raise max_length or pass fewer pictures"
            )
        return EncodedPrompt(row.ids[keep], row.offsets[keep], row.types[keep])

    def apply_chat_template(
        self, conversation: Any, chat_template: str | None = None, sanitize_control_tokens: bool = True, **kwargs: Any
    ) -> Any:
        """`ProcessorMixin.apply_chat_template` with two differences.

        Control tokens that stand in a message's text are encoded as plain text unless `sanitize_control_tokens=False`,
        and the tokenizer adds its special tokens to the rendered chat as the original code does: Llama-3 prompts start
        with two BOS tokens, Vicuna prompts with one.

        Raises:
            ValueError: for an empty chat, an unknown role or content type, or a block with two sources.
        """
        conversation = map_chats(conversation, check_message)
        if kwargs.get("tokenize"):
            control_tokens = control_token_pattern(self.tokenizer) if sanitize_control_tokens else None
            conversation = map_chats(conversation, lambda message, _: mark_literals(message, control_tokens))
            processor_kwargs = dict(kwargs.get("processor_kwargs") or {})
            special = (processor_kwargs.get("text_kwargs") or {}).get("add_special_tokens", True)
            special = processor_kwargs.pop("add_special_tokens", kwargs.pop("add_special_tokens", special))
            kwargs["processor_kwargs"] = {**processor_kwargs, "rendered_special_tokens": special}
        return super().apply_chat_template(conversation, chat_template=chat_template, **kwargs)

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Ids and tiles per picture of one prompt from `(height, width)` sizes; engines plan their memory with it."""
        if image_sizes is None:
            return MultiModalData()
        images_kwargs = self._merge_kwargs(VilaProcessorKwargs, self.tokenizer.init_kwargs, **kwargs)["images_kwargs"]
        grids = self.image_processor.tile_grids(image_sizes, **images_kwargs)
        return MultiModalData(
            num_image_tokens=[len(self.image_block(grid)) for grid in grids],
            num_image_patches=[num_tiles(grid, self._dynamic_scales) for grid in grids],
        )

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names]


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


__all__ = ["VilaProcessor"]
