"""Chats -> the `input_ids` of VILA-U, prompts that ask for a picture included; what it draws -> pictures and videos.

- Every piece of text between pictures is tokenized on its own, as the original does it.
- A video is its frames, one after the other, as pictures.
"""

import math
import os
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature

from .chat_vila import Offset, check_prompts, tokenize, without_breaks
from .media_vila import Medium
from .processing_vila import EncodedPrompt, VilaProcessor

GENERATION_MODES = ("text", "image", "video")
# sentencepiece's mark of a blank
BLANK = "\u2581"
# what is drawn stands behind one of these
IMAGE_START, VIDEO_START = "<im_start>", "<vi_start>"
# between the frames of a video: of the user, of the user in training, and where it is drawn
FRAME_BREAK, MARKED_FRAME_BREAK, DRAWN_FRAME_BREAK = "\n", "<im_end>\n<im_start>", ""
DEFAULT_FPS = 8


class VilaUProcessor(VilaProcessor):
    """`VilaProcessor` for VILA-U; its options are the same, those of tiles, of encoded videos and of tokens around
    pictures have no use.

    `apply_chat_template` also takes `generation_mode` and, for drawing, `negative_text`; `mark_media=True` puts the
    tokens of training around the user's pictures.
    """

    can_stream = False

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        videos: Any = None,
        *,
        generation_mode: str = "text",
        negative_text: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """`VilaProcessor.__call__`; with another `generation_mode`, prompts for drawing.

        Args:
            text: with `generation_mode="image"` or `"video"` one or several descriptions of what is to be drawn.
            generation_mode: `"text"`, `"image"` or `"video"`.
            negative_text: for drawing, what guidance moves away from: one text for all, or one per prompt. By default
                an empty request, as the original does it.

        Returns:
            For drawing `input_ids` and `attention_mask`, `(prompts, sequence)`, and `negative_prompt_ids` and
            `negative_prompt_attention_mask`, one row for all prompts or one for each.

        Raises:
            ValueError: see `VilaProcessor.__call__`; for an unknown mode, or pictures beside a description.
        """
        check_mode(generation_mode)
        if generation_mode == "text":
            check_no_negative(negative_text)
            return super().__call__(images, text, videos, **kwargs)
        if images is not None or videos is not None:
            raise ValueError("a description stands alone: put pictures into a chat, with apply_chat_template")
        chats = [request(prompt) for prompt in check_prompts(text)]
        options = {**DRAWING_CHAT, "generation_mode": generation_mode, "negative_text": negative_text}
        if "return_tensors" in kwargs:
            options["return_tensors"] = kwargs.pop("return_tensors")
        return self.apply_chat_template(chats, **options, processor_kwargs=kwargs)

    def apply_chat_template(
        self, conversation: Any, *args: Any, generation_mode: str = "text", negative_text: Any = None, **kwargs: Any
    ) -> Any:
        """`VilaProcessor.apply_chat_template`.

        Args:
            generation_mode: what the answer is to be. For a picture or video the prompt ends with the token behind
                which it is drawn, and the negative prompt comes with it, see `__call__`.
            negative_text: see `__call__`.

        Raises:
            ValueError: for an unknown mode, or a negative text where nothing is drawn.
        """
        check_mode(generation_mode)
        data = super().apply_chat_template(conversation, *args, generation_mode=generation_mode, **kwargs)
        if generation_mode == "text":
            check_no_negative(negative_text)
            return data
        if not (isinstance(data, BatchFeature) and kwargs.get("add_generation_prompt")):
            return data
        texts = [""] if negative_text is None else check_prompts(negative_text)
        num_prompts = len(data["input_ids"])
        if len(texts) not in (1, num_prompts):
            raise ValueError(f"there are {num_prompts} prompt(s), but {len(texts)} negative ones")
        negative = super().apply_chat_template(
            [request(text) for text in texts], *args, generation_mode=generation_mode, **kwargs
        )
        for name in ("input_ids", "attention_mask"):
            data[{"input_ids": "negative_prompt_ids"}.get(name, f"negative_prompt_{name}")] = negative[name]
        return data

    def image_block(self, grid: Any) -> list[int]:
        """The placeholders of one picture; what stands around them is part of the chat template."""
        return [self.image_token_id] * self.num_tile_tokens

    def _encode(self, prompt: str, media: list[Medium], add_special_tokens: bool, template: Any) -> EncodedPrompt:
        """One prompt -> its ids, offsets in the prompt as it was typed, and token types."""
        encoded = EncodedPrompt([], [], [])
        remaining, position, special = iter(media), 0, add_special_tokens

        def add(tokens: Iterator[tuple[int, Offset]] | list[tuple[int, Offset]], kind: int = 0) -> None:
            for token, offset in tokens:
                encoded.ids.append(token)
                encoded.offsets.append(offset)
                encoded.types.append(kind)

        pieces = re.split(f"({re.escape(self.image_token)}|{re.escape(self.video_token)})", prompt)
        for number, piece in enumerate(pieces):
            if number % 2 == 0:
                chunk = self._encode_chunk(piece, special)
                add((token, (start + position, end + position)) for token, (start, end) in chunk)
                position, special = position + len(without_breaks(piece)), False
                continue
            frames = next(remaining).block
            for index in range(0, len(frames), self.num_tile_tokens):
                if index:
                    separator = self._encode_chunk(frame_break(pieces[number - 1]), False)
                    add([(token, (0, 0)) for token, _ in separator])
                add([(token, (0, 0)) for token in frames[index : index + self.num_tile_tokens]], 1)
            position += len(piece)
        return encoded

    def _encode_chunk(self, text: str, add_special_tokens: bool) -> list[tuple[int, Offset]]:
        """Ids and offsets of the text between two pictures; a first blank is a token of its own, as it was trained."""
        ids = list(tokenize(self.tokenizer, text, add_special_tokens)) if text or add_special_tokens else []
        if text.startswith(" ") and BLANK in self.tokenizer.get_vocab():
            blank = self.tokenizer.convert_tokens_to_ids(BLANK)
            at = next((at for at, (_, (start, end)) in enumerate(ids) if end > start), len(ids))
            ids.insert(at, (blank, (0, 0)))
        return ids

    def post_process_multimodal_output(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """What `generate()` returned -> texts, pictures or videos.

        Args:
            generated_outputs: ids of text; `pixel_values` of pictures, `(samples, 3, height, width)`, or of videos,
                `(samples, frames, 3, height, width)`.
            generation_mode: as in `generate()`.

        Returns:
            A list of texts, of pictures (`PIL.Image.Image`), or of lists of frames, for `save_video`.

        Raises:
            ValueError: for an unknown mode, or another shape.
        """
        mode = generation_mode or "text"
        check_mode(mode)
        if mode == "text":
            return self.post_process_image_text_to_text(
                generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs
            )
        pixels = torch.as_tensor(generated_outputs)
        if pixels.ndim != (4 if mode == "image" else 5) or pixels.shape[-3] != 3:
            wanted = "(samples, 3, height, width)" if mode == "image" else "(samples, frames, 3, height, width)"
            raise ValueError(f"pixel_values of generation_mode {mode!r} are {wanted}, got {tuple(pixels.shape)}")
        return [to_pictures(sample) if mode == "video" else to_pictures(sample[None])[0] for sample in pixels]

    def save_video(self, frames: Sequence[Image.Image], path: str | os.PathLike, fps: float = DEFAULT_FPS) -> None:
        """Writes frames of one size as a video (`.mp4`, H.264 where PyAV has it, else MPEG-4).

        Raises:
            ValueError: if there is no frame, their sizes differ, or the rate makes no sense.
        """
        if not frames or any(frame.size != frames[0].size for frame in frames):
            raise ValueError("a video needs at least one frame, and all of one size")
        if not isinstance(fps, (int, float)) or not 0 < fps <= 1000:
            raise ValueError(f"fps must be above 0 and at most 1000, got {fps}")
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
            # chroma is stored for pairs of pixels
            stream.width, stream.height = (math.ceil(side / 2) * 2 for side in frames[0].size)
            stream.pix_fmt = "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_image(frame.convert("RGB"))))
            container.mux(stream.encode())

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "negative_prompt_ids", "negative_prompt_attention_mask"]


DRAWING_CHAT: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}


def request(text: str) -> list[dict[str, Any]]:
    """The chat that asks for a picture of what a text describes."""
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


def check_mode(mode: Any) -> None:
    if mode not in GENERATION_MODES:
        raise ValueError(f"unknown generation_mode {mode!r}; known are {', '.join(GENERATION_MODES)}")


def check_no_negative(text: Any) -> None:
    if text is not None:
        raise ValueError("negative_text is for generation_mode 'image' or 'video'")


def frame_break(before: str) -> str:
    """What stands between the frames of a video, by what stands before it."""
    if before.endswith(VIDEO_START):
        return DRAWN_FRAME_BREAK
    return MARKED_FRAME_BREAK if before.endswith(IMAGE_START) else FRAME_BREAK


def to_pictures(pixels: torch.Tensor) -> list[Image.Image]:
    """`(N, 3, height, width)`, about -1 to 1 -> pictures; rounded, where the original cuts off."""
    scaled = ((pixels.float() + 1) * 127.5).nan_to_num().clamp(0, 255).round()
    arrays = scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(array)) for array in arrays]


__all__ = ["VilaUProcessor"]
