"""One batch over several processes: which ids, labels, tiles and frames each of them takes. Plain arithmetic.

- A batch is packed: one row of ids in which positions that restart at 0 begin another conversation. Every process
  takes an equal run of it, and keeps its labels aligned with its logits: `shift_labels`.
- Tiles and frames are divided on their own, evenly, wherever their tokens lie: encoding is what costs.
- Nothing here communicates: all processes of a group read the same rows and each keeps its own part.

Source: LongVILA §3.3 (multi-modal sequence parallelism), which divides frames first and tokens after the splicing.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F

from .geometry_vila import TileGrid, num_image_tokens, num_tiles, pooled_frames
from .training_vila import IGNORED, MEDIA, Row


@dataclass(frozen=True)
class Unit:
    """What is encoded by one process: a tile, a picture (dynamic S2), or frames that are pooled together.

    Attributes:
        medium: index of its picture or video.
        tiles: how many, of the modality's flat batch.
        rows: `(first, behind the last)` of its feature rows, several where a video is pooled in several ways.
    """

    modality: str
    medium: int
    tiles: int
    rows: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Shard:
    """What all processes of a group know about a batch, and which of them this is.

    Attributes:
        length: ids of the whole batch, a multiple of `size`.
        row_lengths: of the conversations packed into it.
        placeholders: for every process, how many ids of its part stand for rows of pictures and of videos.
        units: for every process, what it encodes.
        num_labels: kept labels of the whole batch.
        fingerprint: of ids and media, to notice processes that hold different batches.
    """

    size: int
    rank: int
    length: int
    row_lengths: tuple[int, ...]
    placeholders: tuple[tuple[int, int], ...]
    units: tuple[tuple[Unit, ...], ...]
    num_labels: int
    fingerprint: int

    def encoded_rows(self, rank: int) -> torch.Tensor:
        """Indices of the feature rows that a process encodes, in the order in which it gets them.

        Rows of videos count on behind those of pictures.
        """
        behind_pictures = sum(pictures for pictures, _ in self.placeholders)
        ranges = []
        for modality, _, units in runs_of(self.units[rank]):
            offset = behind_pictures if modality == "video" else 0
            # one video is pooled way by way: all its units of the first way come before those of the second
            for way in range(len(units[0].rows)):
                ranges.append(torch.arange(units[0].rows[way][0] + offset, units[-1].rows[way][1] + offset))
        return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.long)

    def needed_rows(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """`(first, behind the last)` row that the ids of a process stand for, of pictures and of videos."""
        behind_pictures = sum(pictures for pictures, _ in self.placeholders)
        before = [sum(counts[i] for counts in self.placeholders[:rank]) for i in range(2)]
        pictures, videos = self.placeholders[rank]
        start = behind_pictures + before[1]
        return (before[0], before[0] + pictures), (start, start + videos)


def runs_of(units: Sequence[Unit]) -> Iterator[tuple[str, int, list[Unit]]]:
    """Units of the same picture or video after each other, in order."""
    run: list[Unit] = []
    for unit in units:
        if run and (unit.modality, unit.medium) != (run[0].modality, run[0].medium):
            yield run[0].modality, run[0].medium, run
            run = []
        run.append(unit)
    if run:
        yield run[0].modality, run[0].medium, run


class BatchSharder:
    """Whole batches -> the part of one process.

    Args:
        config: `VilaConfig` of the model; decides how many rows a picture or a video has.
        size: processes that share a batch.
        rank: which of them this is.

    Raises:
        ValueError: for another family, or a rank outside of the group.
    """

    def __init__(self, config: Any, size: int, rank: int):
        if config.model_type != "vila":
            raise ValueError(f"sequence parallelism is for VILA, NVILA and LongVILA, not for {config.model_type}")
        if not 0 <= rank < size:
            raise ValueError(f"there is no process {rank} in a group of {size}")
        self.config, self.size, self.rank = config, size, rank

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The part of this process.

        Args:
            batch: `input_ids`, `position_ids` and `labels`, `(1, sequence)`, and all media; as `VilaDataCollator`
                packs them. Without `position_ids` it is one conversation, without `labels` there is nothing to learn.

        Returns:
            `input_ids` and `position_ids`, `(1, sequence / size)`, `labels` and `shift_labels` of the same shape,
            both aligned with the logits, pixels of the own units, and the `Shard` as `sequence_shard`.

        Raises:
            ValueError: for more than one row, padding, or a sequence that does not divide by the group.
        """
        ids = batch["input_ids"]
        if ids.shape[0] != 1:
            raise ValueError(
                f"sequence parallelism takes one row of packed conversations, got {ids.shape[0]} rows: packing=True"
            )
        mask, length = batch.get("attention_mask"), ids.shape[1]
        if mask is not None and not mask.all():
            raise ValueError("sequence parallelism takes no padding, attention_mask has zeros: packing=True")
        if length % self.size:
            raise ValueError(
                f"a sequence of {length} ids does not divide by the group of {self.size} processes: "
                "`pad_packed` fills it up"
            )
        positions = batch.get("position_ids")
        positions = torch.arange(length, device=ids.device).unsqueeze(0) if positions is None else positions
        labels = batch.get("labels")
        units = self.units(batch)
        part = slice(self.rank * length // self.size, (self.rank + 1) * length // self.size)
        own: dict[str, Any] = {"input_ids": ids[:, part], "position_ids": positions[:, part]}
        num_labels = 0
        if labels is not None:
            aligned = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
            num_labels = int((aligned != IGNORED).sum())
            own["labels"] = own["shift_labels"] = aligned[:, part].contiguous()
        placeholders = [self.count_placeholders(run) for run in ids[0].chunk(self.size)]
        self.check_placeholders(placeholders, units)
        divided = divide(units, self.size)
        own |= self.own_pixels(batch, divided)
        own["sequence_shard"] = Shard(
            self.size,
            self.rank,
            length,
            row_lengths(positions),
            tuple(placeholders),
            divided,
            num_labels,
            zlib.crc32(ids.cpu().numpy().tobytes() + repr(units).encode()),
        )
        return own

    def count_placeholders(self, ids: torch.Tensor) -> tuple[int, int]:
        return int((ids == self.config.image_token_id).sum()), int((ids == self.config.video_token_id).sum())

    def check_placeholders(self, placeholders: list[tuple[int, int]], units: list[Unit]) -> None:
        for index, modality in enumerate(MEDIA):
            expected = sum(counts[index] for counts in placeholders)
            rows = sum(end - start for unit in units if unit.modality == modality for start, end in unit.rows)
            if rows != expected:
                raise ValueError(
                    f"input_ids has {expected} {modality} placeholders, the {modality}s of the batch have {rows} rows"
                )

    def units(self, batch: dict[str, Any]) -> list[Unit]:
        """All that is to be encoded, in the order of the flat batches of pixels."""
        units: list[Unit] = []
        for modality, (pixels, grid) in MEDIA.items():
            if batch.get(pixels) is None:
                continue
            if batch.get(grid) is None:
                raise ValueError(f"a batch with {pixels} needs {grid}")
            first = 0
            for medium, (frames, rows, cols) in enumerate(batch[grid].tolist()):
                if modality == "image":
                    units += self.image_units(medium, TileGrid(rows, cols), first)
                else:
                    units += self.video_units(medium, frames, first)
                first = units[-1].rows[-1][1] if units else first
            tiles = sum(unit.tiles for unit in units if unit.modality == modality)
            if tiles != len(batch[pixels]):
                raise ValueError(f"{grid} describes {tiles} tiles, {pixels} holds {len(batch[pixels])}")
        return units

    def image_units(self, medium: int, grid: TileGrid, first: int) -> list[Unit]:
        """A unit per tile; dynamic S2 mixes the tiles of a picture, which is one unit."""
        config, per_tile = self.config, self.config.num_tile_tokens
        tiles = num_tiles(grid, config.dynamic_scales)
        if not config.dynamic_s2:
            starts = range(first, first + tiles * per_tile, per_tile)
            return [Unit("image", medium, 1, ((start, start + per_tile),)) for start in starts]
        scales = (config.dynamic_scales, config.s2_resize_output_to_scale_idx)
        rows = num_image_tokens(grid, per_tile, *scales)
        return [Unit("image", medium, tiles, ((first, first + rows),))]

    def video_units(self, medium: int, frames: int, first: int) -> list[Unit]:
        """As few frames as no pooling reaches across."""
        side, pools = math.isqrt(self.config.num_tile_tokens), self.config.video_pool_sizes or [[1, 1, 1]]
        together, ways = math.lcm(*(time for time, _, _ in pools)), pooled_frames(frames, side, pools)
        offsets = list(accumulate((math.prod(way) for way in ways), initial=first))
        units = []
        for start in range(0, frames, together):
            end, rows = min(start + together, frames), []
            for (time, _, _), (_, per_frame), offset in zip(pools, ways, offsets):
                rows.append((offset + start // time * per_frame, offset + math.ceil(end / time) * per_frame))
            units.append(Unit("video", medium, end - start, tuple(rows)))
        return units

    def own_pixels(self, batch: dict[str, Any], divided: tuple[tuple[Unit, ...], ...]) -> dict[str, Any]:
        """Tiles and frames of this process, and the grids that describe them."""
        own: dict[str, Any] = {}
        for modality, (pixels, grid) in MEDIA.items():
            before = sum(u.tiles for units in divided[: self.rank] for u in units if u.modality == modality)
            runs = [(medium, units) for kind, medium, units in runs_of(divided[self.rank]) if kind == modality]
            if not runs:
                continue
            count = sum(unit.tiles for _, units in runs for unit in units)
            own[pixels] = batch[pixels][before : before + count]
            if modality == "video":
                own[grid] = torch.tensor([[sum(unit.tiles for unit in units), 1, 1] for _, units in runs])
            elif self.config.dynamic_s2:
                own[grid] = batch[grid][[medium for medium, _ in runs]]
        return own


def divide(units: Sequence[Unit], size: int) -> tuple[tuple[Unit, ...], ...]:
    """Runs of units with about as many tiles for each of `size` processes, some of which may get none."""
    total, done = sum(unit.tiles for unit in units), 0
    parts: list[list[Unit]] = [[] for _ in range(size)]
    for unit in units:
        parts[(2 * done + unit.tiles) * size // (2 * total)].append(unit)
        done += unit.tiles
    return tuple(map(tuple, parts))


def row_lengths(position_ids: torch.Tensor) -> tuple[int, ...]:
    """Lengths of the conversations packed into `(1, sequence)` positions: another begins where they do not go on."""
    positions = position_ids[0].cpu()
    starts = [0, *((positions[1:] - positions[:-1] != 1).nonzero().flatten() + 1).tolist(), len(positions)]
    return tuple(end - start for start, end in pairwise(starts))


def pad_packed(batch: Row, multiple: int, pad_token_id: int) -> Row:
    """A packed batch whose length is a multiple: filled up with a conversation of padding that nobody learns."""
    missing = -batch["input_ids"].shape[1] % multiple
    if not missing:
        return batch
    filler = torch.arange(missing).unsqueeze(0)
    return {
        **batch,
        "input_ids": F.pad(batch["input_ids"], (0, missing), value=pad_token_id),
        "labels": F.pad(batch["labels"], (0, missing), value=IGNORED),
        "position_ids": torch.cat([batch["position_ids"], filler], dim=1),
    }


__all__ = ["BatchSharder", "Shard", "pad_packed"]
