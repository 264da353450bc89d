"""Which picture or video belongs to which prompt, its pixels, and the ids that stand for it."""

import math
import os
import re
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from transformers.utils import logging

from .chat_vila import tokenize
from .frame_stream_vila import FrameStream, Views, exactly
from .geometry_vila import FEATURES, NOTHING, TileGrid, num_image_tokens, num_tiles, pooled_frames
from .image_loading_vila import upright_size
from .image_processing_vila import errors_name, group_by_conversation
from .video_processing_vila import FramePlan, plan_frames

# videos of more frames than this show a progress bar while they are decoded
LONG_VIDEO_FRAMES = 64


class Medium(NamedTuple):
    """What replaces one media token: its ids, its token type (1: picture, 2: video) and whether it was tiled."""

    block: list[int]
    type: int
    is_tiled: bool


class Seen(NamedTuple):
    """A picture or video of which only the headers were read.

    name: what errors call it.
    source: a picture in any form, or the plan of a video's frames.
    is_encoded: whether it goes through the video encoder; else it is shown as one or more pictures.
    others: how many pictures it shares its prompt with.
    """

    name: str
    source: Any
    is_encoded: bool
    others: int


class VilaMediaBlocks:
    """The media side of `VilaProcessor`, whose attributes it reads."""

    # whether the model takes a `FrameStream`
    can_stream = True
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
        heads: list[str],
    ) -> tuple[dict[str, Any], list[list[Medium]]]:
        """Pixels of all media, and what replaces the media tokens of each prompt, in the order of the text.

        `heads` are the beginnings of the chats, whose rest the prompts are: their media count, but are not read.
        """
        self._check_scales(images_kwargs)
        max_tiles = videos_kwargs.get("video_max_tiles") or self.video_max_tiles
        streams = bool(videos_kwargs.get("stream_frames"))
        if streams and not self.can_stream:
            raise ValueError("stream_frames is for models that encode frames one by one, which this one does not")
        if streams and max_tiles > 1:
            raise ValueError("stream_frames shows every frame as a whole: it cannot be combined with video_max_tiles")
        earlier = [len(self._picture_tokens(head)) for head in heads]
        rows = self._look_at_media(prompts, images, videos, images_kwargs, videos_kwargs, max_tiles, earlier)
        shown: list[Views] = []
        grids: list[TileGrid] = []
        clips: list[Views] = []  # of every encoded video
        media: list[list[Medium]] = []
        for row in rows:
            media.append([])
            for seen in row:
                with errors_name(seen.name):
                    if streams and isinstance(seen.source, FramePlan) and not self._is_picture(seen, max_tiles):
                        views, own_grids = self._stream(seen, images_kwargs), [TileGrid(1, 1)] * seen.source.total
                    else:
                        pictures, own_grids = self._views(seen, images_kwargs, max_tiles)
                        views = Views(len(pictures), pictures)
                if seen.is_encoded:
                    clips.append(views)
                    media[-1].append(Medium(self.video_block(views.length), 2, False))
                else:
                    shown.append(views)
                    grids += own_grids
                    media[-1].append(self._shown(own_grids))
        data = {}
        if shown:
            data["pixel_values"] = self._pixels(shown, images_kwargs)
            data["image_grid_thw"] = np.array([(1, grid.rows, grid.cols) for grid in grids])
        if clips:
            data["pixel_values_videos"] = self._pixels(clips, images_kwargs)
            data["video_grid_thw"] = np.array([(clip.length, 1, 1) for clip in clips])
        return data, media

    def _pixels(self, parts: list[Views], images_kwargs: dict[str, Any]) -> Any:
        """Pixels of all views: an array, or a stream if some are decoded later."""
        to_pixels = partial(self.image_processor.pixels_of_views, **images_kwargs)
        if any(callable(part.views) for part in parts):
            return FrameStream(parts, to_pixels)
        return to_pixels([view for part in parts for view in part.views])

    def _stream(self, seen: Seen, images_kwargs: dict[str, Any]) -> Views:
        """The frames of a video that is decoded when it is encoded; as many as its headers promise."""

        def views() -> Iterator[Any]:
            with errors_name(seen.name):
                for frame in with_progress(exactly(seen.source.frames, seen.source.total, seen.name), seen.source):
                    yield from self.image_processor.frame_views(frame, **images_kwargs)

        return Views(seen.source.total, views)

    def _look_at_media(
        self,
        prompts: list[str],
        images: Any,
        videos: Any,
        images_kwargs: dict[str, Any],
        videos_kwargs: dict[str, Any],
        max_tiles: int,
        earlier: list[int],
    ) -> list[list[Seen]]:
        """The media of each prompt: fetched, but not decoded, and no more than the policy allows."""
        policy, total = images_kwargs["media_policy"], 0
        pictures = assign_media(images, prompts, self.image_token, "picture")
        clips = assign_media(videos, prompts, self.video_token, "video")
        policy.check_media(sum(map(len, pictures + clips)))
        rows: list[list[Seen]] = []
        for number, (prompt, own_pictures, own_clips) in enumerate(
            zip(prompts, map(iter, pictures), map(iter, clips))
        ):
            tokens = re.findall(f"{re.escape(self.image_token)}|{re.escape(self.video_token)}", prompt)
            others = earlier[number] + len(self._picture_tokens(prompt)) - 1
            rows.append([])
            for index, token in enumerate(tokens):
                is_video = token == self.video_token
                name = f"prompt {number}: {'video' if is_video else 'picture'} {tokens[:index].count(token)}"
                with errors_name(name):
                    if is_video:
                        source = self._plan_video(next(own_clips), videos_kwargs, policy)
                    else:
                        source = self.image_processor.fetch_images(next(own_pictures), policy)
                    seen = Seen(name, source, is_video and not self.video_as_images, others)
                    total += self._visual_tokens(seen, images_kwargs, max_tiles)
                    policy.check_visual_tokens(total)
                rows[-1].append(seen)
        return rows

    def _picture_tokens(self, prompt: str) -> list[str]:
        """The tokens of a prompt that stand for what is shown as pictures."""
        shown = [self.image_token, self.video_token] if self.video_as_images else [self.image_token]
        return re.findall("|".join(map(re.escape, shown)), prompt)

    def _plan_video(self, source: Any, videos_kwargs: dict[str, Any], policy: Any) -> FramePlan:
        """Which frames to take of one video: as the call asks, of a file by default as the checkpoint was trained."""
        num_frames, fps = videos_kwargs.get("num_frames"), videos_kwargs.get("fps")
        is_file = isinstance(source, (str, bytes, os.PathLike))
        if num_frames is None and fps is None and is_file and videos_kwargs.get("do_sample_frames") is not False:
            num_frames, fps = self.num_video_frames, self.video_fps or None
            if not isinstance(source, bytes) and os.path.isdir(source):
                fps = None  # pictures have no times
        return plan_frames(source, num_frames, fps, policy)

    def _visual_tokens(self, seen: Seen, images_kwargs: dict[str, Any], max_tiles: int) -> int:
        """Feature rows of a medium, as far as headers tell; frames that are tiled count as if cut to the utmost."""
        if isinstance(seen.source, FramePlan) and not self._is_picture(seen, max_tiles):
            views = seen.source.total * num_tiles(TileGrid(1, max_tiles))
            pools = self.video_pool_sizes if seen.is_encoded else None
            return sum(map(math.prod, pooled_frames(views, math.isqrt(self.num_tile_tokens), pools)))
        if isinstance(seen.source, FramePlan):
            mode = images_kwargs.get("image_mode") or self.image_processor.image_mode
            most_tiles = images_kwargs.get("max_tiles") or self.image_processor.max_tiles
            grid = TileGrid(1, most_tiles if mode in ("dynamic", "dynamic_s2") else 1)
        else:
            grid = self.image_processor.tile_grid(upright_size(seen.source), seen.others > 0, **images_kwargs)
        return num_image_tokens(grid, self.num_tile_tokens, self._dynamic_scales, self.s2_output_scale)

    def _is_picture(self, seen: Seen, max_tiles: int) -> bool:
        """Whether it is tiled like a picture: the original does that with a single frame that is alone, too."""
        if not isinstance(seen.source, FramePlan):
            return True
        return not seen.is_encoded and seen.others == 0 and seen.source.total == max_tiles == 1

    def _views(self, seen: Seen, images_kwargs: dict[str, Any], max_tiles: int) -> tuple[list[Any], list[TileGrid]]:
        """What the tower is shown of a medium, and the grids of it; decoded one by one, and shrunk at once."""
        if self._is_picture(seen, max_tiles):
            picture = next(seen.source.frames) if isinstance(seen.source, FramePlan) else seen.source
            views, grid = self.image_processor.picture_views(picture, seen.others > 0, **images_kwargs)
            return views, [grid]
        steps = with_progress(seen.source.frames, seen.source)
        cut = partial(self.image_processor.frame_views, max_tiles=max_tiles, **images_kwargs)
        views = [view for frame in steps for view in cut(frame)]
        return views, [TileGrid(1, 1)] * len(views)

    def _shown(self, grids: list[TileGrid]) -> Medium:
        """A picture, or a video whose frames are shown one after the other as pictures."""
        block = [token for grid in grids for token in self.image_block(grid)]
        return Medium(block, 1, len(grids) == 1 and grids[0].area > 1)

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
        view = start + [self.image_token_id] * self.num_tile_tokens + end
        return (view + self._separator_ids) * (num_tiles(grid) - 1) + view

    @property
    def _separator_ids(self) -> list[int]:
        """The line break between two tiles."""
        line_break = tokenize(self.tokenizer, f"{self.image_token}\n{self.image_token}", add_special_tokens=False)
        return [token for token, _ in line_break][1:-1]

    def _replacements(self, prompt: str, media: list[Medium]) -> list[dict[str, Any]]:
        """What stands for the pictures of one prompt: one image token for every row that the model makes of it.

        Raises:
            ValueError: if there is a video.
        """
        if self.video_token in prompt:
            raise ValueError("engines are given pictures only: show the frames of a video as pictures")
        found, moved = [], 0
        for match, medium in zip(re.finditer(re.escape(self.image_token), prompt), media):
            text = self.image_token * self._num_rows(medium)
            start, end = match.span()
            place = {"span": (start, end), "new_span": (start + moved, start + moved + len(text))}
            found.append({"type": "image", "text": match[0], "replacement": text, **place})
            moved += len(text) - (end - start)
        return found

    def _cut_by_tiles(self, data: dict[str, Any], media: list[Medium]) -> dict[str, Any]:
        """The pictures' tensors in the form that an engine cuts into pictures: each with one row for every tile.

        An engine puts features into prompts that it tokenized itself. What stands around them, line breaks between
        tiles above all, would not survive as text: the model embeds it, see `image_tile_ids` of `get_image_features`.
        Behind the last tile always stands the break that separates it from a question.
        """
        if "image_grid_thw" not in data:
            return data
        start, end = self._wrapping_ids(self.image_start_tokens), self._wrapping_ids(self.image_end_tokens)
        width = len(start) + 1 + len(end) + len(self._separator_ids)
        grids, tile_ids = data["image_grid_thw"], []
        tiles = [num_tiles(TileGrid(int(rows), int(cols)), self._dynamic_scales) for _, rows, cols in grids]
        for medium, count in zip(media, tiles):
            has_lines = self._has_lines(medium)
            row = [*start, FEATURES, *end, *(self._separator_ids if has_lines else [])]
            rows = [row] * count if has_lines else [row] + [[]] * (count - 1)
            tile_ids += [row + [NOTHING] * (width - len(row)) for row in rows]
        kept = {name: value for name, value in data.items() if name != "image_grid_thw"}
        return {**kept, "image_tile_grids": grids.repeat(tiles, axis=0), "image_tile_ids": np.array(tile_ids)}

    def _num_rows(self, medium: Medium) -> int:
        """Rows that an engine gets of a picture: for its block, and for the line break behind its last tile."""
        return len(medium.block) + (len(self._separator_ids) if self._has_lines(medium) else 0)

    def _has_lines(self, medium: Medium) -> bool:
        """Whether its tiles stand on lines of their own."""
        return medium.is_tiled and not self._dynamic_scales

    def _wrapping_ids(self, text: str | None) -> list[int]:
        return self.tokenizer(text)["input_ids"] if text else []

    @property
    def _dynamic_scales(self) -> list[int] | None:
        return self.image_processor.s2_scales if self.image_processor.image_mode == "dynamic_s2" else None


def with_progress(frames: Iterator[Any], plan: FramePlan) -> Any:
    """The frames, with a progress bar if they are many."""
    is_short = plan.total <= LONG_VIDEO_FRAMES
    return logging.tqdm(frames, desc="Decoding frames", total=plan.total, disable=is_short)


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
