"""Which picture or video belongs to which prompt, its pixels, and the ids that stand for it."""

import math
import os
import re
from collections.abc import Iterator
from itertools import chain, count, groupby, islice
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from transformers.utils import logging

from .chat_vila import tokenize
from .geometry_vila import TileGrid, num_image_tokens, num_tiles, pooled_frames
from .image_processing_vila import errors_name, group_by_conversation
from .video_processing_vila import load_frames

# videos of more frames than this show a progress bar while they are decoded
LONG_VIDEO_FRAMES = 64

# options of the image processor for views that `frame_views` made
CUT_ALREADY = {"image_mode": "plain", "do_resize": False, "do_center_crop": False}


class Medium(NamedTuple):
    """What replaces one media token: its ids, its token type (1: picture, 2: video) and whether it was tiled."""

    block: list[int]
    type: int
    is_tiled: bool


class Shown(NamedTuple):
    """The views that one picture or video is shown as, and whether they have the tower's size already."""

    views: list[Any]
    is_cut: bool


class VilaMediaBlocks:
    """The media side of `VilaProcessor`, whose attributes it reads."""

    image_processor: Any
    tokenizer: Any
    image_token: str
    video_token: str
    image_token_id: int
    video_token_id: int
    num_tile_tokens: int
    s2_output_scale: int
    image_start_tokens: str | None
    image_end_tokens: str | None
    video_as_images: bool
    num_video_frames: int
    video_fps: float
    video_max_tiles: int
    video_pool_sizes: list[list[int]] | None
    video_start_tokens: str | None
    video_end_tokens: str | None
    video_sep_tokens: str | None

    def _process_media(
        self,
        prompts: list[str],
        images: Any,
        videos: Any,
        images_kwargs: dict[str, Any],
        videos_kwargs: dict[str, Any],
    ) -> tuple[dict[str, Any], list[list[Medium]]]:
        """Pixels of all media, and what replaces the media tokens of each prompt, in the order of the text."""
        self._check_scales(images_kwargs)
        images_kwargs = {**images_kwargs, "return_tensors": None}
        if images is not None:
            images = self.image_processor.fetch_images(images, images_kwargs.get("max_pixels"))
        pictures = assign_media(images, prompts, self.image_token, "picture")
        clips = assign_media(videos, prompts, self.video_token, "video")
        rows: list[list[Shown]] = []
        frames: list[list[Any]] = []  # of every encoded video
        numbers = count()
        for prompt, own_pictures, own_clips in zip(prompts, map(iter, pictures), map(iter, clips)):
            tokens = re.findall(f"{re.escape(self.image_token)}|{re.escape(self.video_token)}", prompt)
            row = []
            for token in tokens:
                if token == self.image_token:
                    row.append(Shown([next(own_pictures)], False))
                    continue
                with errors_name(f"video {next(numbers)}"):
                    clip = self._video_views(next(own_clips), len(tokens) == 1, images_kwargs, videos_kwargs)
                if not self.video_as_images:
                    frames.append(clip.views)
                row.append(clip if self.video_as_images else Shown([], True))
            rows.append(row)

        data = self._process_shown(rows, images_kwargs)
        if frames:
            data |= self._process_frames(frames, images_kwargs)
        grids = iter([TileGrid(int(rows), int(cols)) for _, rows, cols in data.get("image_grid_thw", [])])
        clip_lengths = iter(len(clip) for clip in frames)
        media = [
            [
                self._shown(len(views), grids) if views else Medium(self.video_block(next(clip_lengths)), 2, False)
                for views, _ in row
            ]
            for row in rows
        ]
        return data, media

    def _process_shown(self, rows: list[list[Shown]], images_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Pixels of pictures, and of videos shown as such: their frames are cut already, and never tiled again."""
        parts: list[tuple[dict[str, Any], list[Any]]] = []
        for row in rows:
            shown = [medium for medium in row if medium.views]
            if not any(medium.is_cut for medium in shown):
                parts += [(images_kwargs, [view for medium in shown for view in medium.views])] if shown else []
                continue
            # beside a video, a picture is one of several
            tiles = images_kwargs.get("tile_multiple_images", self.image_processor.tile_multiple_images)
            picture_kwargs = images_kwargs if tiles else {**images_kwargs, "image_mode": self._untiled(images_kwargs)}
            frame_kwargs = {**images_kwargs, **CUT_ALREADY}
            parts += [(frame_kwargs if medium.is_cut else picture_kwargs, medium.views) for medium in shown]
        batches = [
            self.image_processor([views for _, views in group], **options)
            for options, group in groupby(parts, key=itemgetter(0))
        ]
        if len(batches) < 2:
            return dict(batches[0]) if batches else {}
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    def _untiled(self, images_kwargs: dict[str, Any]) -> str:
        mode = images_kwargs.get("image_mode") or self.image_processor.image_mode
        return "plain" if mode in ("dynamic", "dynamic_s2") else mode

    def _shown(self, views: int, grids: Iterator[TileGrid]) -> Medium:
        """A picture, or a video whose frames are shown one after the other as pictures."""
        own = [next(grids) for _ in range(views)]
        block = [token for grid in own for token in self.image_block(grid)]
        return Medium(block, 1, len(own) == 1 and own[0].area > 1)

    def _video_views(
        self, source: Any, is_alone: bool, images_kwargs: dict[str, Any], videos_kwargs: dict[str, Any]
    ) -> Shown:
        """The sampled frames of one video as the tower is shown them, shrunk one by one as they are decoded."""
        num_frames, fps = videos_kwargs.get("num_frames"), videos_kwargs.get("fps")
        is_file = isinstance(source, (str, bytes, os.PathLike))
        if num_frames is None and fps is None and is_file and videos_kwargs.get("do_sample_frames") is not False:
            num_frames, fps = self.num_video_frames, self.video_fps or None
            if not isinstance(source, bytes) and os.path.isdir(source):
                fps = None  # pictures have no times
        max_tiles = videos_kwargs.get("video_max_tiles") or self.video_max_tiles
        frames = load_frames(source, num_frames, fps)
        begin = list(islice(frames, 2))
        if self.video_as_images and is_alone and len(begin) == 1 and max_tiles == 1:
            return Shown(begin, False)  # the original tiles a single frame like a single picture
        kwargs = {name: value for name, value in images_kwargs.items() if name != "return_tensors"}
        is_long = (num_frames or 0) > LONG_VIDEO_FRAMES
        steps = logging.tqdm(chain(begin, frames), desc="Decoding frames", total=num_frames, disable=not is_long)
        views = [view for frame in steps for view in self.image_processor.frame_views(frame, max_tiles, **kwargs)]
        return Shown(views, True)

    def _process_frames(self, clips: list[list[Any]], images_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Pixels of encoded videos; their frames are never tiled, only shown as a whole."""
        frames = [frame for clip in clips for frame in clip]
        pixels = self.image_processor([frames], **{**images_kwargs, **CUT_ALREADY})["pixel_values"]
        return {"pixel_values_videos": pixels, "video_grid_thw": np.array([(len(clip), 1, 1) for clip in clips])}

    def video_block(self, num_frames: int) -> list[int]:
        """The ids that replace one video token: every frame that is left after pooling between its start and end ids,
        and the separator behind every pooling."""
        start, end = self._wrapping_ids(self.video_start_tokens), self._wrapping_ids(self.video_end_tokens)
        separator = self._wrapping_ids(self.video_sep_tokens)
        block: list[int] = []
        for frames, tokens in pooled_frames(num_frames, math.isqrt(self.num_tile_tokens), self.video_pool_sizes):
            block += (start + [self.video_token_id] * tokens + end) * frames + separator
        return block

    def _check_scales(self, images_kwargs: dict[str, Any]) -> None:
        """Refuses options of one call that the model cannot follow: it merges the scales that it was trained with."""
        scales = self.image_processor.s2_scales
        if images_kwargs.get("s2_scales", scales) != scales:
            raise ValueError(f"s2_scales belong to the model, which merges {scales}")
        mode = images_kwargs.get("image_mode")
        if (mode == "dynamic" and scales) or (mode == "dynamic_s2" and not scales):
            raise ValueError(f"image_mode {mode!r} does not fit this model, which merges the scales {scales}")

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


def assign_media(given: Any, prompts: list[str], token: str, noun: str) -> list[list[Any]]:
    """Pictures or videos, as one list or a list per prompt -> those of each prompt, as many as it has tokens.

    Raises:
        ValueError: if the counts differ; the message names both, and the prompt if there is a list for each.
    """
    counts = [prompt.count(token) for prompt in prompts]
    groups = [] if given is None else group_by_conversation(given) if noun == "picture" else group_videos(given)
    if len(groups) == len(prompts):
        for row, (group, count) in enumerate(zip(groups, counts)):
            if len(group) != count:
                raise ValueError(f"prompt {row} has {count} {token} token(s), but {len(group)} {noun}(s)")
    elif len(groups) > 1:
        raise ValueError(f"there are {len(prompts)} prompt(s), but {len(groups)} lists of {noun}s")
    media = [medium for group in groups for medium in group]
    if len(media) != sum(counts):
        raise ValueError(f"the text has {sum(counts)} {token} token(s), but {len(media)} {noun}(s) were given")
    remaining = iter(media)
    return [[next(remaining) for _ in range(count)] for count in counts]


def group_videos(videos: Any) -> list[list[Any]]:
    """One video, a list of videos or a list per prompt -> a list per prompt; a list of pictures is one video."""
    if not isinstance(videos, (list, tuple)) or is_frame_list(videos):
        return [[videos]]
    if all(isinstance(entry, (list, tuple)) and not is_frame_list(entry) for entry in videos):
        return [list(entry) for entry in videos]
    return [list(videos)]


def is_frame_list(video: Any) -> bool:
    """Whether a list holds the frames of one video: pictures, or arrays of one picture."""
    return (
        isinstance(video, (list, tuple))
        and len(video) > 0
        and all(isinstance(frame, Image.Image) or getattr(frame, "ndim", None) in (2, 3) for frame in video)
    )
