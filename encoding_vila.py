"""From pixels to feature rows: tiles and frames through the tower a few at a time, scales merged, videos pooled.

Shape letters: N tiles, L tokens of a tile, D tower channels, S side of a map in patches, T tokens and H channels after
the projector.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple

from .configuration_vila import VilaConfig
from .geometry_vila import (
    FEATURES,
    NOTHING,
    TileGrid,
    crops_per_side,
    num_image_tokens,
    num_tiles,
    output_blocks,
    pooled_frames,
    scale_splits,
)
from .vision_vila import concat_scales, merge_blocks, pool_video, split_blocks, to_map

# videos of more chunks than this show a progress bar while they are encoded
LONG_VIDEO_CHUNKS = 16


class VilaMediaEncoder:
    """Encodes pictures and videos, for a model with a tower and a projector."""

    config: VilaConfig
    vision_tower: PreTrainedModel
    multi_modal_projector: nn.Module

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_grid_thw: torch.Tensor | None = None,
        image_tile_grids: torch.Tensor | None = None,
        image_tile_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """Encodes pictures.

        Args:
            pixel_values: `(N, 3, height, width)`, the tiles of all pictures one after the other; or a `FrameStream`.
            image_grid_thw: `(pictures, 3)`, `(1, rows, columns)` of every picture's tile grid; by default every tile
                is a picture of its own.
            image_tile_grids: `(N, 3)`, the same from engines, which cut tensors into pictures by tiles: for every tile
                the grid of its picture.
            image_tile_ids: `(N, ids)`, what stands around the features of every tile: token ids, -2 in the features'
                place, and -1 as filler; a tile of fillers alone stands with the one before it. The rows of a picture
                then include the embeddings of these ids.

        Returns:
            Output whose `pooler_output` is a list with one `(tokens, hidden_size)` tensor per picture.

        Raises:
            ValueError: if the grids do not add up to the number of tiles.
        """
        if image_tile_grids is not None:
            image_grid_thw = picture_grids(image_tile_grids, self.config.dynamic_scales)
        grids = self._tile_grids(pixel_values, image_grid_thw)
        if not isinstance(pixel_values, torch.Tensor):
            features = list(self.stream_features("image", pixel_values, image_grid_thw))
            return BaseModelOutputWithPooling(pooler_output=features)
        pixel_values = pixel_values.to(self.vision_tower.dtype)
        if self.config.dynamic_s2:
            features = self._encode_dynamic_s2(pixel_values, grids, **kwargs)
        else:
            chunks = pixel_values.split(self._chunk_size)
            encoded = torch.cat([self.multi_modal_projector(self._encode_tiles(c, **kwargs)) for c in chunks])
            tiles = encoded.split([num_tiles(grid) for grid in grids])
            features = [picture.flatten(0, 1) for picture in tiles]
        if image_tile_ids is not None:
            counts = [num_tiles(grid, self.config.dynamic_scales) for grid in grids]
            features = [self._surround(*pair) for pair in zip(features, image_tile_ids.split(counts))]
        return BaseModelOutputWithPooling(pooler_output=features)  # type: ignore[arg-type]

    def _surround(self, features: torch.Tensor, tile_ids: torch.Tensor) -> torch.Tensor:
        """One picture, `(rows, H)`, with the embeddings of what stands around its tiles, see `get_image_features`."""
        embed: Any = self.get_input_embeddings()  # type: ignore[attr-defined]
        rows = [row[row != NOTHING] for row in tile_ids if (row == FEATURES).any()]
        pieces = []
        for row, part in zip(rows, features.chunk(len(rows))):
            place = row.tolist().index(FEATURES)
            pieces += [embed(row[:place]), part, embed(row[place + 1 :])]
        return torch.cat([piece.to(features.device, features.dtype) for piece in pieces])

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_grid_thw: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """Encodes videos frame by frame, a few at a time, and pools them.

        Args:
            pixel_values_videos: `(N, 3, height, width)`, the frames of all videos one after the other; or a
                `FrameStream`.
            video_grid_thw: `(videos, 3)`, `(frames, 1, 1)` of every video; by default all frames are one video.

        Returns:
            Output whose `pooler_output` is a list with one `(tokens, hidden_size)` tensor per video.

        Raises:
            ValueError: if the grids do not add up to the number of frames.
        """
        counts = [len(pixel_values_videos)] if video_grid_thw is None else video_grid_thw[:, 0].tolist()
        if sum(counts) != len(pixel_values_videos):
            raise ValueError(
                f"video_grid_thw describes {sum(counts)} frames, pixel_values_videos holds {len(pixel_values_videos)}"
            )
        if not isinstance(pixel_values_videos, torch.Tensor):
            pixel_values_videos = pixel_values_videos.to(self.vision_tower.device)
        is_long = len(pixel_values_videos) > LONG_VIDEO_CHUNKS * self._chunk_size
        with logging.tqdm(total=sum(counts), desc="Encoding frames", unit="frame", disable=not is_long) as progress:
            features = [self._encode_video(frames, progress, **kwargs) for frames in pixel_values_videos.split(counts)]
        return BaseModelOutputWithPooling(pooler_output=features)  # type: ignore[arg-type]

    def stream_features(
        self, modality: str, pixel_values: Any, grid_thw: torch.Tensor | None = None
    ) -> Iterator[torch.Tensor]:
        """The features of `get_image_features` or `get_video_features`, row after row, encoded as they are asked for.

        Args:
            modality: `"image"` or `"video"`.
            pixel_values, grid_thw: as of these two; a `FrameStream` is decoded as it is encoded.

        Yields:
            `(rows, hidden_size)`: of a picture, or of the few frames of a video that were encoded together.
        """
        if not isinstance(pixel_values, torch.Tensor):
            pixel_values = pixel_values.to(self.vision_tower.device)
        if modality == "video":
            yield from self._stream_videos(pixel_values, grid_thw)
            return
        grids = self._tile_grids(pixel_values, grid_thw)
        groups: list[list[TileGrid]] = []
        tiles: list[int] = []
        for grid in grids:
            count = num_tiles(grid, self.config.dynamic_scales)
            if not groups or tiles[-1] + count > self._chunk_size:
                groups.append([])
                tiles.append(0)
            groups[-1].append(grid)
            tiles[-1] += count
        is_tensor = isinstance(pixel_values, torch.Tensor)
        chunks = pixel_values.split(tiles) if is_tensor else pixel_values.read(tiles)
        for chunk, group in zip(chunks, groups):
            group_thw = torch.tensor([(1, grid.rows, grid.cols) for grid in group])
            yield from self.get_image_features(chunk, group_thw, return_dict=True).pooler_output

    def _stream_videos(self, pixel_values: Any, grid_thw: torch.Tensor | None) -> Iterator[torch.Tensor]:
        counts = [len(pixel_values)] if grid_thw is None else grid_thw[:, 0].tolist()
        for frames in pixel_values.split(counts):
            # the rows of a second pooling come behind all rows of the first
            blocks = [frames] if len(self.config.video_pool_sizes or []) > 1 else frames.split(self._block_size)
            for block in blocks:
                yield from self.get_video_features(block, return_dict=True).pooler_output

    def _encode_video(self, frames: torch.Tensor, progress: Any, **kwargs: Any) -> torch.Tensor:
        """One video, `(frames, 3, height, width) -> (tokens, H)`, pooled as it is encoded."""
        pools = self.config.video_pool_sizes
        if pools is None:
            return self._encode_chunks(frames, progress, **kwargs).flatten(0, 1)
        pooled: list[list[torch.Tensor]] = [[] for _ in pools]
        for block in frames.split(self._block_size):
            maps = to_map(self._encode_chunks(block, progress, **kwargs))
            for parts, pool in zip(pooled, pools):
                parts.append(pool_video(maps, [pool]))
        return torch.cat([part for parts in pooled for part in parts])

    def _encode_chunks(self, frames: torch.Tensor, progress: Any, **kwargs: Any) -> torch.Tensor:
        """`(frames, 3, height, width) -> (frames, T, H)`, a few at a time."""
        encoded: Any = []
        for chunk in frames.split(self._chunk_size):
            features = self._encode_frames(chunk.to(self.vision_tower.dtype), **kwargs)
            if torch.is_grad_enabled():
                encoded.append(features)
            else:
                # into one tensor as they come: joining them at the end would hold all of them twice
                if len(encoded) == 0:
                    encoded, filled = features.new_empty(len(frames), *features.shape[1:]), 0
                encoded[filled : filled + len(chunk)] = features
                filled += len(chunk)
            progress.update(len(chunk))
        return torch.cat(encoded) if isinstance(encoded, list) else encoded

    def _encode_frames(self, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """A chunk of frames -> `(N, T, H)`; with dynamic S2 a frame's channels stand for all scales."""
        features = self._encode_tiles(pixel_values, **kwargs)
        repeats = len(self.config.s2_scales) if self.config.dynamic_s2 else 1
        return self.multi_modal_projector(features.repeat(1, 1, repeats))

    @property
    def _chunk_size(self) -> int:
        """Tiles that go through the tower at a time; on a CPU more of them only take more memory."""
        return self.config.vision_chunk_size or (4 if self.vision_tower.device.type == "cpu" else 8)

    @property
    def _block_size(self) -> int:
        """Frames of a video that are encoded and pooled together: no group of any pooling reaches across blocks."""
        together = math.lcm(*(time for time, _, _ in self.config.video_pool_sizes or []))
        return together * math.ceil(self._chunk_size / together)

    def media_sizes(
        self, modality: str, pixel_values: torch.Tensor, grid_thw: torch.Tensor | None
    ) -> list[tuple[int, int]]:
        """Tiles (of a video: frames) and feature rows of every picture or video; arguments as of the features."""
        config = self.config
        if modality == "video":
            counts = [len(pixel_values)] if grid_thw is None else grid_thw[:, 0].tolist()
            side = math.isqrt(config.num_tile_tokens)
            pooled = [pooled_frames(count, side, config.video_pool_sizes) for count in counts]
            return [(count, sum(map(math.prod, pools))) for count, pools in zip(counts, pooled)]
        scales = (config.dynamic_scales, config.s2_resize_output_to_scale_idx)
        return [
            (num_tiles(grid, config.dynamic_scales), num_image_tokens(grid, config.num_tile_tokens, *scales))
            for grid in self._tile_grids(pixel_values, grid_thw)
        ]

    def _tile_grids(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor | None) -> list[TileGrid]:
        if image_grid_thw is None:
            return [TileGrid(1, 1)] * len(pixel_values)
        grids = [TileGrid(rows, cols) for _, rows, cols in image_grid_thw.tolist()]
        expected = sum(num_tiles(grid, self.config.dynamic_scales) for grid in grids)
        if expected != len(pixel_values):
            raise ValueError(f"image_grid_thw describes {expected} tiles, pixel_values holds {len(pixel_values)}")
        return grids

    def _run_tower(self, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """`(N, 3, height, width) -> (N, L, D)` at the tower's own resolution."""
        features = self.vision_tower(pixel_values=pixel_values, **kwargs).last_hidden_state
        return features[:, 1:] if self.config.vision_feature_select_strategy == "default" else features

    def _encode_tiles(self, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """One chunk of tiles -> what enters the projector; static S2 (S2-Wrapper) if the config says so."""
        if not self.config.s2:
            return self._run_tower(pixel_values, **kwargs)
        maps = []
        for scale in self.config.s2_scales:
            scaled = F.interpolate(pixel_values.float(), size=(scale, scale), mode="bicubic", align_corners=False)
            side = crops_per_side(scale, self.config.s2_max_split_size or self.config.s2_scales[0])
            grid = TileGrid(side, side)
            pictures = scaled.to(pixel_values.dtype).permute(0, 2, 3, 1)
            crops = torch.cat([split_blocks(picture, grid) for picture in pictures]).permute(0, 3, 1, 2)
            chunks = crops.split(self._chunk_size)
            crop_maps = to_map(torch.cat([self._run_tower(chunk, **kwargs) for chunk in chunks]))
            maps.append(torch.stack([merge_blocks(own, grid) for own in crop_maps.split(grid.area)]))
        return concat_scales(maps, self.config.s2_resize_output_to_scale_idx).flatten(1, 2)

    def _encode_dynamic_s2(
        self, pixel_values: torch.Tensor, grids: list[TileGrid], **kwargs: Any
    ) -> list[torch.Tensor]:
        """All tiles of all pictures -> projected features per picture (NVILA §3.1, dynamic S2)."""
        chunks = pixel_values.split(self._chunk_size)
        tiles_NLD = torch.cat([self._run_tower(chunk, **kwargs) for chunk in chunks])
        features = []
        for tiles, grid in zip(tiles_NLD.split([num_tiles(g, self.config.s2_scales) for g in grids]), grids):
            blocks = output_blocks(grid, self.config.s2_scales, self.config.s2_resize_output_to_scale_idx)
            merged = self._merge_dynamic_scales(to_map(tiles), grid)
            # block by block, as in training: the projector's zero padding falls on every block's own edge
            projected = self.multi_modal_projector(split_blocks(merged, blocks).flatten(1, 2))
            features.append(merge_blocks(to_map(projected), blocks).flatten(0, 1))
        return features

    def _merge_dynamic_scales(self, maps_NSSD: torch.Tensor, grid: TileGrid) -> torch.Tensor:
        """Tile maps of one picture, scale by scale -> one map with the channels of all scales."""
        scales = self.config.s2_scales
        if grid.area == 1:
            return maps_NSSD[0].repeat(1, 1, len(scales))
        splits = [TileGrid(k, k) for k in scale_splits(scales)[:-1]] + [grid]
        per_scale = maps_NSSD.split([split.area for split in splits])
        maps = [merge_blocks(scale_maps, split) for scale_maps, split in zip(per_scale, splits)]
        return concat_scales(maps, self.config.s2_resize_output_to_scale_idx)


def picture_grids(tile_grids: torch.Tensor, scales: list[int] | None) -> torch.Tensor:
    """`(tiles, 3)`, the grid of its picture for every tile -> `(pictures, 3)`."""
    grids, tile = [], 0
    while tile < len(tile_grids):
        grids.append(tile_grids[tile])
        _, rows, cols = grids[-1].tolist()
        tile += num_tiles(TileGrid(rows, cols), scales)
    return torch.stack(grids) if grids else tile_grids
