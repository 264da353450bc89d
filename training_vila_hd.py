"""Chats -> batches for training VILA-HD: what to answer, and where to look."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from .training_vila import IGNORED, Row, VilaDataCollator

# what chooses the patches; its loss reaches the encoder's low-resolution pass as well
SELECTION_PARTS = (
    "model.multi_modal_projector.top_down_prompt_head",
    "model.vision_tower.selection_feature_proj",
    "model.vision_tower.highres_selection_feature_module",
    "model.vision_tower.prompt_proj_for_highres",
)
MAPS = "gt_selection_maps"


class VilaHDDataCollator(VilaDataCollator):
    """`VilaDataCollator` for `VilaHDForConditionalGeneration`.

    A row may have `"boxes"`: for each of its pictures a list of `(left, top, right, bottom)`, as fractions of the
    picture's size, where the question should make the model look; None for a picture without. Such a row teaches where
    to look, not what to answer, and needs no answer; the model's config weighs it by `token_selection_loss_weight`.

    Args:
        options: those of `VilaDataCollator`; rows cannot be packed, since looking moves their positions.

    Raises:
        ValueError: if an option makes no sense.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        if self.packing:
            raise ValueError("rows of VILA-HD cannot be packed: looking closely moves their positions")

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Row:
        """See `VilaDataCollator`; with boxes the batch has `gt_selection_maps`, `(pictures, height, width)`, -1 for
        pictures without."""
        has_boxes = any(isinstance(row, dict) and row.get("boxes") is not None for row in rows)
        batch = super().__call__(rows)
        if not has_boxes:
            batch.pop(MAPS, None)
        return batch

    def encode_row(self, row: dict[str, Any]) -> Row:
        """See `VilaDataCollator.encode_row`.

        Raises:
            ValueError: if there is not one list of boxes per picture, or a box is none.
        """
        boxes = row.get("boxes") if isinstance(row, dict) else None
        if boxes is not None and row["messages"] and row["messages"][-1]["role"] != "assistant":
            row = {**row, "messages": [*row["messages"], {"role": "assistant", "content": "."}]}
        encoded = super().encode_row(row)
        if "pixel_values" not in encoded:
            if boxes:
                raise ValueError("a row has boxes, but no picture within max_length")
            return encoded
        kept, (height, width) = len(encoded["pixel_values"]), encoded["pixel_values"].shape[2:]
        if boxes is not None:
            encoded["labels"] = torch.full_like(encoded["labels"], IGNORED)
            # a row that was cut has lost its last pictures
            if len(boxes) < kept:
                raise ValueError(f"a row has {kept} pictures, but boxes of {len(boxes)}")
        encoded[MAPS] = torch.stack([box_map((boxes or [None] * kept)[i], height, width) for i in range(kept)])
        return encoded


def train_selection_only(model: PreTrainedModel) -> PreTrainedModel:
    """Freezes everything but what chooses the patches (`tune_top_down_selection` of the original)."""
    model.requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith(SELECTION_PARTS))
    return model


def box_map(boxes: Any, height: int, width: int) -> torch.Tensor:
    """`(height, width)`, 1 within the boxes and their edges, -1 everywhere if there are none (VILA-HD training).

    Args:
        boxes: `(left, top, right, bottom)` of each, as fractions.

    Raises:
        ValueError: if a box is not four numbers of 0 to 1 in that order.
    """
    if not boxes:
        return torch.full((height, width), -1.0)
    wanted = torch.zeros(height, width)
    for box in boxes:
        if len(box) != 4 or not (0 <= box[0] <= box[2] <= 1 and 0 <= box[1] <= box[3] <= 1):
            raise ValueError("a box must be (left, top, right, bottom), fractions of 0 to 1 of the picture's size")
        left, top, right, bottom = box
        rows = slice(math.floor(top * height), math.ceil(bottom * height) + 1)
        columns = slice(math.floor(left * width), math.ceil(right * width) + 1)
        wanted[rows, columns] = 1
    return wanted


__all__ = ["SELECTION_PARTS", "VilaHDDataCollator", "box_map", "train_selection_only"]
