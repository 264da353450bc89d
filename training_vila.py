"""Fine-tuning: chats -> batches with labels for any `transformers.Trainer`, and what is trained of a model.

- The labels are what the chat template marks as the assistant's: its text and its end-of-turn token.
- Packing puts all rows of a batch into one; positions that restart at 0 keep their attention apart.
- A row that is too long loses its end, never a part of a picture.
"""

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.utils import logging

from .configuration_vila import first
from .geometry_vila import TileGrid, num_tiles, patches_per_side
from .processing_vila import VilaProcessor

logger = logging.get_logger(__name__)

IGNORED = -100
# what a preset or `train_only` may name -> the modules of a `VilaForConditionalGeneration`
PARTS = {
    "vision_tower": ("model.vision_tower",),
    "projector": ("model.multi_modal_projector",),
    "language_model": ("model.language_model", "lm_head"),
    "depth_transformer": ("model.depth_transformer",),  # of VILA-U
}
# the linear layers of the language model, for `peft.LoraConfig(target_modules=...)`
LORA_TARGETS = r".*\.language_model\..*\.(q|k|v|o|gate|up|down)_proj"

# modality -> names of its tensors in a batch
MEDIA = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}

Row = dict[str, torch.Tensor]


class VilaDataCollator:
    """Rows `{"messages": [...]}` -> what `VilaForConditionalGeneration.forward` takes, labels included.

    Messages have the form that `VilaProcessor.apply_chat_template` takes, pictures and videos included. Give `Trainer`
    the argument `remove_unused_columns=False`: it would take the messages out of the rows.

    Args:
        processor: the checkpoint's processor. Its chat template must mark the assistant's text with
            `{% generation %}`, as all templates of this package do.
        packing: all rows in one, without padding. The batch has `position_ids` and no `attention_mask`; transformers
            derives from that, for every attention implementation, that rows do not see each other.
        max_length: ids that a row may have; longer ones are cut. By default none is.
        pad_to_multiple_of: pads to a multiple of so many ids; not with packing.
        processor_kwargs: options of the processor. By default every picture of a row is tiled, as the original does
            in training; `{"tile_multiple_images": False}` trains what its inference shows.

    Raises:
        ValueError: if an option makes no sense.
    """

    # variables of the chat template
    template_variables: dict[str, Any] = {}

    def __init__(
        self,
        processor: VilaProcessor,
        packing: bool = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        processor_kwargs: dict[str, Any] | None = None,
    ):
        for name, value in (("max_length", max_length), ("pad_to_multiple_of", pad_to_multiple_of)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if packing and pad_to_multiple_of is not None:
            raise ValueError("a packed batch has no padding: pad_to_multiple_of does not go with packing")
        self.processor = processor
        self.packing = packing
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.processor_kwargs = {"tile_multiple_images": True, **(processor_kwargs or {})}

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Row:
        """A batch of `len(rows)` rows; with packing `(1, sum of lengths)`.

        Returns:
            `input_ids` and `labels`, `(batch, sequence)`, `attention_mask` or with packing `position_ids` of the same
            shape, and the tensors of all pictures and videos one after the other.

        Raises:
            ValueError: for a row without messages, without an assistant's message, or one that the processor refuses.
        """
        encoded = [self.encode_row(row) for row in rows]
        batch = self._pack(encoded) if self.packing else self._pad(encoded)
        media_names = dict.fromkeys(name for row in encoded for name in row if name not in ("input_ids", "labels"))
        for name in media_names:
            batch[name] = torch.cat([row[name] for row in encoded if name in row])
        return batch

    def encode_row(self, row: dict[str, Any]) -> Row:
        """One row, cut to `max_length`: `input_ids` and `labels`, `(sequence,)`, and the tensors of its media."""
        if not isinstance(row, dict) or "messages" not in row:
            raise ValueError(
                "a row needs a chat under 'messages'; Trainer needs remove_unused_columns=False to keep it"
            )
        data = self.processor.apply_chat_template(
            row["messages"],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": False, **self.processor_kwargs},
            **self.template_variables,
        )
        ids, mask = torch.tensor(data.pop("input_ids")[0]), torch.tensor(data.pop("assistant_masks")[0])
        if not mask.any():
            raise ValueError(
                "a row has nothing to learn: it has no assistant message, or the chat template does not mark the "
                "assistant's text with {% generation %}"
            )
        media = {name: media_tensor(value) for name, value in data.items() if name != "attention_mask"}
        encoded = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, IGNORED), **media}
        if self.max_length is not None and len(ids) > self.max_length:
            encoded = self._cut(encoded, self.max_length)
        return encoded

    def _cut(self, row: Row, max_length: int) -> Row:
        """The first `max_length` ids; less if the cut would go through a picture, which then goes with its pixels."""
        logger.warning_once(f"Some rows are longer than max_length={max_length} tokens: their ends are cut off.")
        spans = {modality: self._spans(row, modality) for modality, (_, grid) in MEDIA.items() if grid in row}
        limit = max_length
        for start, end in sorted(span for media in spans.values() for span in media):
            limit = start if start < limit < end else limit
        if not limit:
            raise ValueError(f"max_length={max_length} leaves nothing of a row that starts with a picture")
        cut = {**row, "input_ids": row["input_ids"][:limit], "labels": row["labels"][:limit]}
        for modality, media in spans.items():
            pixels, grid = MEDIA[modality]
            kept = sum(end <= limit for _, end in media)
            if not kept:
                del cut[pixels], cut[grid]
                continue
            tiles = sum(self._num_tiles(modality, size) for size in row[grid][:kept].tolist())
            cut |= {pixels: row[pixels][:tiles], grid: row[grid][:kept]}
        if (cut["labels"] == IGNORED).all():
            logger.warning_once(f"Some rows have no answer within max_length={max_length} tokens and teach nothing.")
        return cut

    def _spans(self, row: Row, modality: str) -> list[tuple[int, int]]:
        """From the first to behind the last feature of every picture or video, in positions of `input_ids`."""
        token_id = getattr(self.processor, f"{modality}_token_id")
        positions = iter((row["input_ids"] == token_id).nonzero().flatten().tolist())
        spans = []
        for frames, rows, cols in row[MEDIA[modality][1]].tolist():
            is_image = modality == "image"
            block = (
                self.processor.image_block(TileGrid(rows, cols)) if is_image else self.processor.video_block(frames)
            )
            taken = list(islice(positions, block.count(token_id)))
            spans.append((taken[0], taken[-1] + 1))
        return spans

    def _num_tiles(self, modality: str, grid_thw: list[int]) -> int:
        frames, rows, cols = grid_thw
        return frames if modality == "video" else num_tiles(TileGrid(rows, cols), self.processor._dynamic_scales)

    def _pad(self, rows: list[Row]) -> Row:
        """Right padding; the pad id may be one that the text uses, the mask tells them apart."""
        length, multiple = max(len(row["input_ids"]) for row in rows), self.pad_to_multiple_of or 1
        length = math.ceil(length / multiple) * multiple
        columns = {
            "input_ids": self.processor.tokenizer.pad_token_id,
            "labels": IGNORED,
            "attention_mask": 0,
        }
        rows = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
        return {
            name: torch.stack([F.pad(row[name], (0, length - len(row[name])), value=filler) for row in rows])
            for name, filler in columns.items()
        }

    def _pack(self, rows: list[Row]) -> Row:
        """All rows behind each other; the first label of each would be predicted from the row before it."""
        labels = [F.pad(row["labels"][1:], (1, 0), value=IGNORED) for row in rows]
        return {
            "input_ids": torch.cat([row["input_ids"] for row in rows]).unsqueeze(0),
            "labels": torch.cat(labels).unsqueeze(0),
            "position_ids": torch.cat([torch.arange(len(row["input_ids"])) for row in rows]).unsqueeze(0),
        }


def media_tensor(value: Any) -> torch.Tensor:
    """What the processor returns for the media of one row, as a tensor."""
    return value if torch.is_tensor(value) else torch.from_numpy(np.stack([np.asarray(item) for item in value]))


def parts_of(model: PreTrainedModel) -> list[str]:
    """The names in `PARTS` that a model has. What else VILA-U has, its codes and their decoder, is never trained."""
    modules = dict(model.named_modules())
    return [part for part, names in PARTS.items() if all(name in modules for name in names)]


def train_only(model: PreTrainedModel, parts: Sequence[str]) -> PreTrainedModel:
    """Freezes everything but the named parts, of `parts_of(model)`.

    Raises:
        ValueError: for an unknown part, or none.
    """
    known = parts_of(model)
    if not parts or not set(parts) <= set(known):
        raise ValueError(f"name one or several of {', '.join(known)}, got {', '.join(parts) or 'none'}")
    model.requires_grad_(False)
    for part in parts:
        for name in PARTS[part]:
            model.get_submodule(name).requires_grad_(True)
    return model


def resize_position_embeddings(weight: torch.Tensor, new_length: int) -> torch.Tensor:
    """`(length, channels) -> (new_length, channels)`, as the original does it for another `vision_resolution`.

    Linear along the flattened index, not over the two sides of the map. Row `i` falls on `i * (length - 1) /
    (new_length - 1)` of the old ones; where that is a whole number, both neighbours are the same row, both weights
    are 0, and so is the result. That is always so for the first and the last row; a trained checkpoint has learned
    them anew.

    Raises:
        ValueError: if there is not more than one row before and after.
    """
    length = len(weight)
    if min(length, new_length) < 2:
        raise ValueError(f"cannot resize {length} position embeddings to {new_length}")
    index = torch.arange(new_length, dtype=torch.float32, device=weight.device) / (new_length - 1) * (length - 1)
    lower, upper = index.floor(), index.ceil()
    after, before = (index - lower).unsqueeze(-1), (upper - index).unsqueeze(-1)
    resized = after * weight[upper.long()].float() + before * weight[lower.long()].float()
    return resized.to(weight.dtype)


def set_vision_resolution(model: PreTrainedModel, processor: VilaProcessor, resolution: int) -> None:
    """Makes a model take pictures of another size, to be trained further: the original's `vision_resolution`.

    Args:
        model: a `VilaForConditionalGeneration` with a SigLIP tower and without S2; changed in place, as its config.
        processor: of the same checkpoint; changed in place.
        resolution: side of a tile in pixels.

    Raises:
        ValueError: for another tower, a model with S2, or a resolution that holds less than 2x2 patches.
    """
    config = model.config
    if config.vision_config.model_type != "siglip_vision_model" or config.s2 or config.dynamic_s2:
        raise ValueError("vision_resolution is for models with a SigLIP tower and without S2")
    side = patches_per_side(resolution, first(config.vision_config.patch_size))
    embeddings = model.model.vision_tower.embeddings
    old = embeddings.position_embedding.weight
    resized = resize_position_embeddings(old.detach(), side**2)
    embeddings.position_embedding = torch.nn.Embedding.from_pretrained(resized, freeze=not old.requires_grad)
    embeddings.image_size, embeddings.num_patches, embeddings.num_positions = resolution, side**2, side**2
    embeddings.position_ids = torch.arange(side**2, device=old.device).expand((1, -1))
    config.vision_config.image_size = resolution
    image_processor = processor.image_processor
    if image_processor.do_center_crop:
        image_processor.size = {"shortest_edge": resolution}
        image_processor.crop_size = {"height": resolution, "width": resolution}
    else:
        image_processor.size = {"height": resolution, "width": resolution}
    processor.num_tile_tokens = config.num_tile_tokens


__all__ = ["VilaDataCollator", "parts_of", "resize_position_embeddings", "set_vision_resolution", "train_only"]
