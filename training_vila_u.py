"""Chats -> batches for training VILA-U: what the assistant draws is learned as codes, beside what it writes."""

from typing import Any

import torch

from .chat_vila import MEDIA_KEYS, check_message, map_chats
from .processing_vila_u import IMAGE_START, VIDEO_START
from .tiling_vila import crop_square
from .training_vila import IGNORED, Row, VilaDataCollator


class VilaUDataCollator(VilaDataCollator):
    """`VilaDataCollator` for `VilaUForConditionalGeneration`.

    A picture or video in an assistant's turn is one that the model learns to draw. It is cropped to a square (see
    `image_mode="square"` of `VilaImageProcessor`), and `labels` holds `image_token_id` at its placeholders: the model
    computes the codes. A picture of the user stands between the same tokens, as the release was trained.

    Args:
        caption_dropout: the share of rows that only draw whose request is left out, so that the negative prompt of
            guidance is learned (Classifier-Free Diffusion Guidance §3.2). The release has none.
        options: those of `VilaDataCollator`.

    Raises:
        ValueError: if an option makes no sense.
    """

    template_variables = {"mark_media": True}

    def __init__(self, *args: Any, caption_dropout: float = 0.0, **options: Any):
        super().__init__(*args, **options)
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"caption_dropout must be 0 to 1, got {caption_dropout}")
        self.caption_dropout = caption_dropout
        vocabulary = self.processor.tokenizer.get_vocab()
        starts = [vocabulary[token] for token in (IMAGE_START, VIDEO_START) if token in vocabulary]
        self.start_ids = torch.tensor(starts)

    def encode_row(self, row: dict[str, Any]) -> Row:
        """See `VilaDataCollator.encode_row`."""
        if isinstance(row, dict) and "messages" in row:
            messages = map_chats(row["messages"], check_message)
            if self.caption_dropout and draws_only(messages) and torch.rand(()) < self.caption_dropout:
                messages = [{**m, "content": ""} if m["role"] == "user" else m for m in messages]
            row = {**row, "messages": [self._with_squares(message) for message in messages]}
        encoded = super().encode_row(row)
        encoded["labels"] = self._with_drawn(encoded["input_ids"], encoded["labels"])
        return encoded

    def _with_squares(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message whose pictures, if the assistant draws them, are cropped."""
        if message["role"] != "assistant" or isinstance(message["content"], str):
            return message
        return {**message, "content": [self._square(block) for block in message["content"]]}

    def _square(self, block: dict[str, Any]) -> dict[str, Any]:
        if block["type"] == "text":
            return block
        image_processor = self.processor.image_processor
        source = next((block[key] for key in MEDIA_KEYS if key in block), None)
        if block["type"] == "image":
            picture = image_processor.process_image(image_processor.fetch_images(source))
            return {"type": "image", "image": crop_square(picture)}
        plan = self.processor._plan_video(source, self.processor_kwargs, self.processor.media_policy)
        return {"type": "video", "video": [crop_square(image_processor.process_image(f)) for f in plan.frames]}

    def _with_drawn(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Labels in which the placeholders behind a start token that is itself learned are learned too."""
        image_id = self.processor.image_token_id
        is_picture = input_ids == image_id
        starts = torch.isin(input_ids, self.start_ids) & (labels != IGNORED)
        # the last id in front of each position that is no placeholder
        positions = torch.arange(len(input_ids)).masked_fill(is_picture, -1).cummax(0).values
        is_drawn = is_picture & (positions >= 0) & starts[positions.clamp(min=0)]
        return labels.masked_fill(is_drawn, image_id)


def draws_only(messages: list[dict[str, Any]]) -> bool:
    """Whether all that the assistant says is pictures and videos."""
    blocks = [
        block
        for message in messages
        if message["role"] == "assistant"
        for block in ([message["content"]] if isinstance(message["content"], str) else message["content"])
    ]
    return bool(blocks) and all(isinstance(block, dict) and block["type"] != "text" for block in blocks)


__all__ = ["VilaUDataCollator"]
