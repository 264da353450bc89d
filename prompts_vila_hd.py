"""Prompts of VILA-HD: where their pictures and questions lie, and the placeholders inserted for what is seen closely.

A row is a prompt without its padding. Its pictures have placeholders for the low-resolution view; patches that were
looked at get theirs directly behind, before anything that ends the picture.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .configuration_vila_hd import VilaHDConfig


class PromptRow(NamedTuple):
    """One prompt.

    ids: `(length,)` without padding; columns: where they stand in the batch, -1 if inserted.
    picture_ends: for each picture the position behind its last placeholder; first_picture: its number in the batch.
    question_end: position of the last token of the first question.
    """

    ids: torch.Tensor
    columns: torch.Tensor
    picture_ends: list[int]
    first_picture: int
    question_end: int

    @property
    def pictures(self) -> range:
        return range(self.first_picture, self.first_picture + len(self.picture_ends))

    @property
    def prefix(self) -> int:
        """Tokens that are the same before and after looking: those up to the end of the first low-resolution view.

        Behind it patches are inserted: later tokens move, and see them.
        """
        return min(self.picture_ends[0], self.question_end + 1) if self.picture_ends else len(self.ids) - 1

    def with_inserted(self, counts: list[int]) -> "PromptRow":
        """The row with placeholders for so many more features behind each of its pictures."""
        ids, columns, ends = [], [], []
        start, moved = 0, 0
        for end, count in zip(self.picture_ends, counts):
            ids += [self.ids[start:end], self.ids[end - 1 : end].expand(count)]
            columns += [self.columns[start:end], self.columns.new_full((count,), -1)]
            start, moved = end, moved + count
            ends.append(end + moved)
        ids.append(self.ids[start:])
        columns.append(self.columns[start:])
        return self._replace(ids=torch.cat(ids), columns=torch.cat(columns), picture_ends=ends)


def read_rows(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: VilaHDConfig, num_pictures: int
) -> list[PromptRow]:
    """A padded batch, `(batch, sequence)`, as rows.

    Raises:
        ValueError: if placeholders and pictures do not fit each other, or the mask is no `(batch, sequence)`.
    """
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            "attention_mask must have the shape of input_ids: to continue a chat, pass all of it with its pictures"
        )
    rows, first_picture, per_picture = [], 0, config.num_tile_tokens
    for number, ids in enumerate(input_ids):
        columns = torch.arange(len(ids), device=ids.device)
        if attention_mask is not None:
            columns = columns[attention_mask[number].bool()]
        ids = ids[columns]
        places = (ids == config.image_token_id).nonzero().flatten().tolist()
        if len(places) % per_picture:
            raise ValueError(
                f"prompt {number} has {len(places)} image placeholders, no multiple of the {per_picture} of a picture"
            )
        ends = [place + 1 for place in places[per_picture - 1 :: per_picture]]
        rows.append(PromptRow(ids, columns, ends, first_picture, question_end(ids, config.user_end_ids)))
        first_picture += len(ends)
    if first_picture != num_pictures:
        raise ValueError(f"input_ids has placeholders of {first_picture} pictures, pixel_values holds {num_pictures}")
    return rows


def question_end(ids: torch.Tensor, end_ids: list[int] | None) -> int:
    """Position of the last token in front of the first `end_ids`; of the last token if they do not occur."""
    if end_ids and len(end_ids) <= len(ids):
        wanted = torch.tensor(end_ids, device=ids.device)
        found = (ids.unfold(0, len(end_ids), 1) == wanted).all(1).nonzero()
        if len(found):
            return max(int(found[0]) - 1, 0)
    return len(ids) - 1


class PaddedRows(NamedTuple):
    """Rows as a batch: ids, mask and columns, `(batch, sequence)`."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    columns: torch.Tensor


def pad_rows(rows: list[PromptRow], prefixes: list[int]) -> PaddedRows:
    """Pads on the left, in two parts: the prefixes end in the same column, as they do in the cache."""
    parts = [(slice(end), slice(end, None)) for end in prefixes]
    widths = [max(prefixes), max(len(row.ids) - end for row, end in zip(rows, prefixes))]

    def batch(values: list[torch.Tensor], filler: int) -> torch.Tensor:
        padded = [
            torch.cat(
                [F.pad(own[part], (width - len(own[part]), 0), value=filler) for part, width in zip(cut, widths)]
            )
            for own, cut in zip(values, parts)
        ]
        return torch.stack(padded)

    return PaddedRows(
        batch([row.ids for row in rows], 0),
        batch([torch.ones_like(row.ids) for row in rows], 0),
        batch([row.columns for row in rows], -1),
    )


def join(row: PromptRow, features: list[torch.Tensor]) -> torch.Tensor:
    """Features of all pictures of a row; `features` are those of all pictures of the batch."""
    if row.picture_ends:
        return torch.cat([features[picture] for picture in row.pictures])
    return features[0][:0]
