"""Chats -> `input_ids` with one placeholder per feature row, and pixels.

- The text is tokenized once; then, on ids, every image token becomes the block that the original splices in: start
  ids, placeholders, end ids. The model inserts nothing.
- Text of the user stays text: control tokens that are typed in a message are encoded as ordinary characters.
- Inserted ids have the character offset (0, 0), so that assistant masks cover what the assistant wrote and no picture.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import MultiModalData, ProcessingKwargs
from transformers.utils import logging

from .chat_vila import (
    Offset,
    break_offsets,
    check_message,
    check_prompts,
    control_token_pattern,
    escape_breaks,
    map_chats,
    mark_literals,
    message_ends,
    tokenize,
    without_breaks,
)
from .geometry_vila import num_tiles
from .image_processing_vila import VilaImagesKwargs, errors_name_options, group_by_conversation
from .media_vila import Medium, VilaMediaBlocks, group_videos
from .turns_vila import VilaTurns, behind_marker, drop_first
from .video_processing_vila import VilaVideosKwargs

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


# of the constructor: type and least value
NUMBERS: dict[str, tuple[Any, float]] = {
    "num_tile_tokens": (int, 1),
    "s2_output_scale": (int, -math.inf),
    "num_video_frames": (int, 1),
    "video_fps": ((int, float), 0),
    "video_max_tiles": (int, 1),
    "num_time_tokens": (int, 0),
}
TEXTS = ("image_start_tokens", "image_end_tokens", "video_start_tokens", "video_end_tokens", "video_sep_tokens")


class VilaProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: VilaImagesKwargs  # type: ignore[misc]
    videos_kwargs: VilaVideosKwargs  # type: ignore[misc]


class EncodedPrompt(NamedTuple):
    """One prompt, media expanded; the three lists are parallel."""

    ids: list[int]
    offsets: list[Offset]
    types: list[int]


class VilaProcessor(VilaMediaBlocks, VilaTurns, ProcessorMixin):
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
        video_as_images: whether a video's frames are shown like pictures, as most checkpoints were trained, or encoded
            as a video.
        num_video_frames: frames that are taken of a video file by default, spread evenly.
        video_fps: frames per second that are taken by default, `num_video_frames` at most; 0 spreads them evenly.
        video_max_tiles: tiles that a frame is cut into at most; every tile then counts as a frame.
        video_pool_sizes: temporal-spatial pooling of an encoded video, as in `VilaConfig`.
        video_start_tokens, video_end_tokens: text around every frame that is left after pooling.
        video_sep_tokens: text behind every pooling.
        num_time_tokens, time_token_format: the time tokens of models that answer with times, see `decode_times`.
        media_policy: which sources of media are read and how large they may be: a `MediaPolicy`, `"notebook"`,
            `"server"` or a dictionary of its fields to change. It is the image processor's, is never saved, and no
            file of a checkpoint sets it. A pipeline fetches the strings in its argument `images=` by itself, before
            this processor sees them: only media in chats go through the policy.
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
        video_as_images: bool = True,
        num_video_frames: int = 8,
        video_fps: float = 0.0,
        video_max_tiles: int = 1,
        video_pool_sizes: list[list[int]] | None = None,
        video_start_tokens: str | None = None,
        video_end_tokens: str | None = "\n",
        video_sep_tokens: str | None = None,
        num_time_tokens: int = 0,
        time_token_format: str = "<t{t}>",
        *,
        media_policy: Any = None,
    ):
        self.num_tile_tokens = num_tile_tokens
        self.s2_output_scale = s2_output_scale
        self.image_start_tokens = image_start_tokens
        self.image_end_tokens = image_end_tokens
        self.video_as_images = video_as_images
        self.num_video_frames = num_video_frames
        self.video_fps = video_fps
        self.video_max_tiles = video_max_tiles
        self.video_pool_sizes = video_pool_sizes
        self.video_start_tokens = video_start_tokens
        self.video_end_tokens = video_end_tokens
        self.video_sep_tokens = video_sep_tokens
        self.num_time_tokens = num_time_tokens
        self.time_token_format = time_token_format
        check_options(self)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.media_policy = media_policy
        for token in (self.image_token, self.video_token):
            if token not in tokenizer.get_added_vocab():
                raise ValueError(f"the tokenizer lacks the media token {token!r}: convert the checkpoint first")
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)

    @classmethod
    def from_pretrained(cls, *args: Any, media_policy: Any = None, **kwargs: Any) -> Any:
        """`ProcessorMixin.from_pretrained`; the policy is kept from the tokenizer, which would save it."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).media_policy = media_policy
        return loaded

    @property
    def media_policy(self) -> Any:
        return self.image_processor.media_policy

    @media_policy.setter
    def media_policy(self, change: Any) -> None:
        self.image_processor.media_policy = change

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        *,
        rendered_special_tokens: bool | None = None,
        rendered_by: str | None = None,
        behind: str | None = None,
        media_policy: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tokenizes prompts, cuts their pictures and samples their videos.

        Args:
            images: pictures in the order of the `<image>` tokens; a flat list or one list per prompt.
            text: one or several prompts with one `<image>` per picture and one `<vila/video>` per video.
            videos: files, URLs, bytes, folders, arrays or lists of pictures, see `load_frames`; a flat list or one
                list per prompt.
            rendered_special_tokens: overrides `add_special_tokens`; set by `apply_chat_template`.
            rendered_by: the chat template that wrote the text, by default the processor's; set likewise.
            behind: process only what stands behind this text in every prompt; set by `continue_chat`.
            media_policy: changes the processor's policy for this call.
            kwargs: options of the tokenizer, of `VilaImageProcessor` and of `VilaVideosKwargs`.

        Returns:
            `input_ids` and `attention_mask`, `(prompts, sequence)`; with pictures, or videos shown as pictures,
            `pixel_values` and `image_grid_thw`, see `VilaImageProcessor`; with encoded videos `pixel_values_videos`,
            `(frames of all videos, 3, height, width)`, and `video_grid_thw`, `(videos, 3)`: `(frames, 1, 1)`.
            With `return_text_replacement_offsets`, which engines ask for: the image tokens that replace each one and,
            for `image_grid_thw`, `image_tile_grids` and `image_tile_ids`, see `get_image_features`.

        Raises:
            ValueError: if media and media tokens differ in number, a prompt is no text or has no tokens, an
                option has the wrong type, a medium cannot be read or the policy refuses it, or a prompt is truncated
                inside a picture.
        """
        if kwargs.pop("audio", None) is not None:
            raise ValueError("this processor takes pictures, videos and text, no audio")
        if any("media_policy" in (kwargs.get(name) or {}) for name in ("images_kwargs", "videos_kwargs")):
            raise ValueError("media_policy is one for pictures and videos: pass it directly")
        prompts = check_prompts(text)
        if rendered_special_tokens is None:
            # only `apply_chat_template` puts breaks into a text: here they are characters like others
            prompts = [escape_breaks(prompt) for prompt in prompts]
        heads = [""] * len(prompts)
        if behind is not None:
            heads, prompts = behind_marker(behind, prompts)
            images = images and drop_first(group_by_conversation(images), heads, self.image_token)
            videos = videos and drop_first(group_videos(videos), heads, self.video_token)
        merged = self._merge_kwargs(VilaProcessorKwargs, self.tokenizer.init_kwargs, **kwargs)
        merged["images_kwargs"]["media_policy"] = self.media_policy.changed(media_policy)
        text_kwargs = merged["text_kwargs"]
        for name in ("return_mm_token_type_ids", "return_text_replacement_offsets"):
            text_kwargs.setdefault(name, merged[name])
        if rendered_special_tokens is not None:
            text_kwargs["add_special_tokens"] = rendered_special_tokens

        for_engine = text_kwargs["return_text_replacement_offsets"] and rendered_special_tokens is None
        if for_engine:  # which keeps what a picture becomes, to put it beside other ones
            merged["images_kwargs"] = {"tile_multiple_images": True, **merged["images_kwargs"]}
        media_data, media = self._process_media(
            prompts, images, videos, merged["images_kwargs"], merged["videos_kwargs"], heads
        )
        add_special_tokens = text_kwargs.get("add_special_tokens", True) and behind is None
        template = rendered_by or self.chat_template
        rows = [self._encode(prompt, row, add_special_tokens, template) for prompt, row in zip(prompts, media)]
        for number, row in enumerate(rows):
            if not row.ids:
                raise ValueError(f"prompt {number} has no tokens")
        text_data = self._batch(rows, **text_kwargs)
        if for_engine:
            text_data["text_replacement_offsets"] = [self._replacements(*row) for row in zip(prompts, media)]
            media_data = self._cut_by_tiles(media_data, [medium for row in media for medium in row])
        elif text_kwargs["return_text_replacement_offsets"]:
            text_data["text_replacement_offsets"] = [break_offsets(prompt) for prompt in prompts]
        return BatchFeature(
            {**text_data, **media_data},
            tensor_type=text_kwargs.get("return_tensors"),
            skip_tensor_conversion=self.skip_tensor_conversion,
        )

    def _merge_kwargs(self, *args: Any, **kwargs: Any) -> dict[str, dict]:
        with errors_name_options():
            return super()._merge_kwargs(*args, **kwargs)

    def _encode(self, prompt: str, media: list[Medium], add_special_tokens: bool, template: Any) -> EncodedPrompt:
        """One prompt -> its ids, offsets in the prompt as it was typed, and token types."""
        text, breaks = self._add_tile_breaks(prompt, media, template)
        encoded = EncodedPrompt([], [], [])
        remaining = iter(media)
        for token, (start, end) in tokenize(self.tokenizer, text, add_special_tokens):
            is_medium = token in (self.image_token_id, self.video_token_id)
            ids, kind, _ = next(remaining) if is_medium else ([token], 0, False)
            # the line breaks added for tiles do not exist in the caller's prompt
            offset = (start - bisect_left(breaks, start), end - bisect_left(breaks, end))
            if is_medium or offset[0] == offset[1]:
                offset = (0, 0)
            encoded.ids.extend(ids)
            encoded.offsets.extend([offset] * len(ids))
            encoded.types.extend([kind] * len(ids))
        return encoded

    def _add_tile_breaks(self, prompt: str, media: list[Medium], template: Any) -> tuple[str, list[int]]:
        """Adds the line break that the original puts behind the last tile, unless the picture ends its message.

        Returns the text and the positions of the added characters in it, not counting the breaks in typed tokens.
        """
        if self._dynamic_scales or not any(medium.is_tiled for medium in media):
            return prompt, []
        tokens = f"({re.escape(self.image_token)}|{re.escape(self.video_token)})"
        text, *rest = re.split(tokens, prompt)
        breaks = []
        for index, (token, following, medium) in enumerate(zip(rest[::2], rest[1::2], media)):
            text += token
            if medium.is_tiled and not self._ends_message(following, template, is_last=index == len(media) - 1):
                breaks.append(len(without_breaks(text)))
                text += "\n"
            text += following
        return text, breaks

    def _ends_message(self, following: str, template: Any, is_last: bool) -> bool:
        """Whether what follows a picture was written by the chat template and not in the picture's message."""
        tokenizer = self.tokenizer
        template = template if isinstance(template, str) else None
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
                f"truncation to {max_length} tokens would cut into a picture or video; raise max_length or pass fewer"
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
        if kwargs.get("load_audio_from_video"):
            # it would be fetched outside of the media policy
            raise ValueError("this processor takes pictures, videos and text, no audio")
        conversation = map_chats(conversation, check_message)
        if kwargs.get("tokenize"):
            processor_kwargs = dict(kwargs.get("processor_kwargs") or {})
            # pipelines can pass options on only there
            sanitize_control_tokens = processor_kwargs.pop("sanitize_control_tokens", sanitize_control_tokens)
            control_tokens = control_token_pattern(self.tokenizer) if sanitize_control_tokens else None
            conversation = map_chats(conversation, lambda message, _: mark_literals(message, control_tokens))
            processor_kwargs["rendered_by"] = self._resolve_chat_template(chat_template)
            special = (processor_kwargs.get("text_kwargs") or {}).get("add_special_tokens", True)
            special = processor_kwargs.pop("add_special_tokens", kwargs.pop("add_special_tokens", special))
            kwargs["processor_kwargs"] = {**processor_kwargs, "rendered_special_tokens": special}
        return super().apply_chat_template(conversation, chat_template=chat_template, **kwargs)

    def decode_times(self, text: str, duration: float) -> str:
        """Replaces the time tokens in an answer by seconds, `<12.34>`.

        Args:
            duration: length in seconds of the video that the answer is about; the last time token stands for its end.
        """
        if self.num_time_tokens < 2:
            return text
        before, after = map(re.escape, self.time_token_format.split("{t}"))
        step = duration / (self.num_time_tokens - 1)
        return re.sub(
            f"{before}(\\d+){after}", lambda match: f"<{round(min(int(match[1]) * step, duration), 2)}>", text
        )

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Rows and tiles of pictures of `(height, width)` as engines get them, each for itself: they plan with it."""
        if image_sizes is None:
            return MultiModalData()
        images_kwargs = self._merge_kwargs(VilaProcessorKwargs, self.tokenizer.init_kwargs, **kwargs)["images_kwargs"]
        grids = self.image_processor.tile_grids(image_sizes, **{"tile_multiple_images": True, **images_kwargs})
        return MultiModalData(
            num_image_tokens=[self._num_rows(self._shown([grid])) for grid in grids],
            num_image_patches=[num_tiles(grid, self._dynamic_scales) for grid in grids],
        )

    @property
    def model_input_names(self) -> list[str]:
        videos = ["pixel_values_videos", "video_grid_thw"]
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names, *videos]


def check_options(processor: VilaProcessor) -> None:
    """Refuses what a damaged file of a checkpoint may say, before it is computed with.

    Raises:
        ValueError: naming the option.
    """
    for name, (kind, least) in NUMBERS.items():
        value = getattr(processor, name)
        if isinstance(value, bool) or not isinstance(value, kind) or not least <= value < math.inf:
            raise ValueError(f"{name} must be a {'whole ' if kind is int else ''}number of at least {least}")
    for name in TEXTS:
        if not isinstance(getattr(processor, name), (str, type(None))):
            raise ValueError(f"{name} must be a text or None")
    if not isinstance(processor.video_as_images, bool):
        raise ValueError("video_as_images must be True or False")
    if not isinstance(processor.time_token_format, str) or processor.time_token_format.count("{t}") != 1:
        raise ValueError("time_token_format must be a text with one {t}")
    if processor.video_pool_sizes is not None and not is_pooling(processor.video_pool_sizes):
        raise ValueError("video_pool_sizes must be None or a list of triples of whole numbers of at least 1")


def is_pooling(pools: Any) -> bool:
    if not isinstance(pools, (list, tuple)) or not pools:
        return False
    return all(
        isinstance(pool, (list, tuple)) and len(pool) == 3 and all(type(n) is int and n >= 1 for n in pool)
        for pool in pools
    )


__all__ = ["VilaProcessor"]
