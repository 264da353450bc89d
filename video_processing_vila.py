"""Videos -> sampled frames, with PyAV alone.

- Frames are chosen as the original does: spread evenly, or at a rate (specs of NVILA's release; OpenCV's indices).
- A packet scan gives every frame's time and the key frames without decoding. Decoding then starts at the key frame
  before a wanted frame and skips what lies between: no more work than one pass, far less for sparse frames.
- Only formats that store the display time of every frame are sought in; of others the frames are counted.
- Frames are yielded one by one, so that a caller can shrink each before the next is decoded.
"""

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.stream import Disposition
from PIL import Image
from transformers.processing_utils import VideosKwargs
from transformers.utils import logging

from .geometry_vila import sample_frames
from .image_loading_vila import open_image
from .media_policy_vila import MediaPolicy
from .media_sources_vila import open_source

logger = logging.get_logger(__name__)

FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FPS_RANGE = (1e-6, 1e3)
MAX_INT = 2**31 - 1  # of FFmpeg's options
# by FFmpeg's names; playlists and anything else that refers to other files are left out
SEEKABLE = {"mp4", "matroska"}
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,flv,gif,asf,ogg,h264,hevc,ivf,mxf,dv,nut,"
    "apng,webp_anim,rm,yuv4mpegpipe,wav,mp3,flac,aac"
)


class VilaVideosKwargs(VideosKwargs, total=False):
    """
    num_frames: frames to take, spread evenly; with `fps` the most that are taken.
    fps: frames to take per second.
    video_max_tiles: cut every frame into up to that many tiles, each of which counts as a frame.
    stream_frames: decode frames only when the model encodes them, so that a long video's pixels are never held.
    """

    video_max_tiles: int
    stream_frames: bool


class Packets(NamedTuple):
    """What a file says of its frames without decoding them.

    times: display times in ascending order; None where the format does not tell them reliably.
    keys: indices of the frames that decoding can start at.
    fps: average frames per second, 0 if unknown.
    """

    times: list[Any]
    keys: list[int]
    fps: float


class FramePlan(NamedTuple):
    """What will be taken of one video.

    total: how many frames; fewer come if some cannot be decoded.
    open: gives the frames in order, decoded as they are asked for; anew with every call.
    """

    total: int
    open: Callable[[], Iterator[Any]]

    @property
    def frames(self) -> Iterator[Any]:
        return self.open()


def load_frames(
    source: Any, num_frames: int | None = None, fps: float | None = None, policy: Any = None
) -> Iterator[Any]:
    """Frames of one video, in order; each a PIL picture or one of the arrays that were given. See `plan_frames`."""
    return plan_frames(source, num_frames, fps, policy).frames


def plan_frames(source: Any, num_frames: int | None = None, fps: float | None = None, policy: Any = None) -> FramePlan:
    """Looks which frames to take of one video, without decoding any.

    Args:
        source: path or URL of a file, its bytes, a data URI, a folder of pictures, a `(frames, H, W, 3)` array or a
            list of pictures.
        num_frames: how many to take, spread evenly over the video; short videos repeat frames. None takes all.
        fps: take that many per second instead, `num_frames` at most. Needs a file.
        policy: the `MediaPolicy`; by default that of a notebook.

    Raises:
        ValueError: if there is no frame, no video stream, the file is broken, an option makes no sense, or the policy
            refuses the source, the size of its frames or their number.
    """
    policy = policy or MediaPolicy()
    if num_frames is not None:
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}")
        policy.check_frames(num_frames, "the given video")
    if fps and not FPS_RANGE[0] <= fps <= FPS_RANGE[1]:
        raise ValueError(f"fps must be 0 or {FPS_RANGE[0]:f} to {FPS_RANGE[1]:.0f} frames per second, got {fps}")
    if not isinstance(source, (str, bytes, os.PathLike)):
        return choose(source, num_frames, fps, "the given video", policy)
    if folder := frame_folder(source, policy):
        files = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in FRAME_SUFFIXES)
        return choose(files, num_frames, fps, f"the folder {os.path.basename(folder)!r}", policy)
    content, name = open_source(source, "video", policy)
    return plan_file(BytesIO(content) if isinstance(content, bytes) else content, name, num_frames, fps, policy)


def frame_folder(source: str | bytes | os.PathLike, policy: Any) -> str | None:
    """The folder of pictures that a source names, if it is one that the policy allows."""
    if isinstance(source, bytes) or not policy.may_read(path := os.fsdecode(source)):
        return None
    return policy.readable_folder(path)


def choose(frames: Any, num_frames: int | None, fps: float | None, name: str, policy: Any) -> FramePlan:
    """Frames of a sequence that has no times: arrays, pictures, or paths of pictures."""
    if isinstance(frames, (Image.Image, dict)) or not hasattr(frames, "__len__"):
        raise ValueError("a video must be a file, a folder, an array or a list of pictures")
    if hasattr(frames, "is_floating_point"):  # a tensor; numpy lacks bfloat16
        frames = frames.detach().cpu()
        frames = (frames.float() if frames.is_floating_point() else frames).numpy()
    if getattr(frames, "ndim", 4) != 4:
        raise ValueError(f"{name} must have four dimensions, frames first, got {frames.ndim}")
    if len(frames) == 0:
        raise ValueError(f"{name} holds no frames")
    if fps:
        raise ValueError(f"{name} has no frame rate: pass num_frames instead of fps")
    policy.check_frames(num_frames or len(frames), name)
    indices = range(len(frames)) if num_frames is None else sample_frames(len(frames), num_frames)
    is_source = isinstance(frames[0], (str, bytes, os.PathLike))
    level = level_of(frames)
    return FramePlan(
        len(indices),
        lambda: (
            open_image(frames[index], policy).to_image(policy) if is_source else level(frames[index])
            for index in indices
        ),
    )


def level_of(frames: Any) -> Callable[[Any], Any]:
    """What brings the frames of one video to 8 bits by the same measure, so that a dark frame stays dark.

    Raises:
        ValueError: if an array holds NaN or values out of range.
    """
    kind = getattr(frames, "dtype", np.dtype(object)).kind
    if kind not in "iuf" or 0 in frames.shape:
        return lambda frame: frame
    low, high, highest = float(frames.min()), float(frames.max()), 255 if kind == "f" else 65535
    if not 0 <= low <= high <= highest:  # written so that NaN fails
        raise ValueError(f"an array of frames must hold 0 to 1 or 0 to 255 (integers: to 65535), got {low} to {high}")
    if high <= (1 if kind == "f" else 255):
        return lambda frame: frame
    return lambda frame: (np.rint(frame) if kind == "f" else frame // 257).astype(np.uint8)


def plan_file(file: str | BytesIO, name: str, num_frames: int | None, fps: float | None, policy: Any) -> FramePlan:
    """Which frames to take of a file; those that cannot be decoded are left out later, with a warning."""
    try:
        packets = scan_packets(file, name, policy)
    except av.FFmpegError as error:
        raise ValueError(f"{name} is broken or no video") from error
    total = len(packets.times)
    most = num_frames or (policy.max_frames + 1 if fps else total)
    indices = sample_frames(total, most, fps or 0.0, packets.fps)
    policy.check_frames(len(indices), name)
    if fps and len(sample_frames(total, len(indices) + 1, fps, packets.fps)) > len(indices):
        seconds = len(indices) / fps
        logger.warning(f"{name} is seen up to second {seconds:g} only: at fps={fps:g}, num_frames={most} end there")
    return FramePlan(len(indices), partial(decode_frames, file, name, packets, indices, policy))


def decode_frames(
    file: str | BytesIO, name: str, packets: Packets, indices: list[int], policy: Any
) -> Iterator[Image.Image]:
    """The frames of a file at ascending indices, which may repeat."""
    repeats, missing = Counter(indices), len(indices)
    try:
        for index, frame in frames_at(file, packets, sorted(repeats), policy):
            policy.check_pixels(frame.width, frame.height, f"decoding {name}")
            picture = frame.to_image()
            if frame.rotation:
                picture = picture.rotate(frame.rotation, expand=True)
            for _ in range(repeats[index]):
                missing -= 1
                yield picture
    except av.FFmpegError as error:
        raise ValueError(f"{name} is broken or no video") from error
    if missing == len(indices):
        raise ValueError(f"no frame of {name} can be decoded")
    if missing:
        logger.warning(f"{missing} of {len(indices)} frames of {name} cannot be decoded and are left out")


def video_duration(source: str | bytes | os.PathLike, policy: Any = None) -> float | None:
    """Seconds of a video that `load_frames` opens; None if it has no frame rate, as a folder of pictures.

    Raises:
        ValueError: if it is broken or no video, or the policy refuses it.
    """
    policy = policy or MediaPolicy()
    if frame_folder(source, policy):
        return None
    content, name = open_source(source, "video", policy)
    try:
        packets = scan_packets(BytesIO(content) if isinstance(content, bytes) else content, name, policy)
    except av.FFmpegError as error:
        raise ValueError(f"{name} is broken or no video") from error
    return len(packets.times) / packets.fps if packets.fps else None


def open_container(file: str | BytesIO, policy: Any) -> Any:
    if isinstance(file, BytesIO):
        file.seek(0)
    # a playlist would make FFmpeg read other files or URLs
    options = {"format_whitelist": FORMATS, **decoder_limits(policy)}
    return av.open(file, options=options, metadata_errors="replace")


def decoder_limits(policy: Any) -> dict[str, str]:
    """Keeps FFmpeg from allocating a frame that has grown in the middle of a stream; it rounds sizes up."""
    return {"max_pixels": str(min(2 * policy.max_pixels, MAX_INT))}


def video_streams(container: Any) -> list[Any]:
    """Streams of moving pictures; the cover of a song is none."""
    return [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]


def scan_packets(file: str | BytesIO, name: str, policy: Any) -> Packets:
    """Reads a file's packets without decoding them.

    Raises:
        ValueError: if there is no video stream or no frame in it, or frames are too large.
    """
    with open_container(file, policy) as container:
        if not (streams := video_streams(container)):
            raise ValueError(f"{name} has no video stream")
        stream = streams[0]
        if stream.codec_context is None:
            raise ValueError(f"{name} has an unknown codec")
        policy.check_pixels(stream.width, stream.height, f"decoding {name}")
        found = [
            (packet.pts, packet.is_keyframe)
            for packet in read_packets(container, stream)
            if packet.size and not (packet.is_discard or packet.is_corrupt)
        ]
        if not found:
            raise ValueError(f"{name} holds no frames")
        if len(found) < stream.frames:
            logger.warning(f"{name} is cut: it says it has {stream.frames} frames, but only {len(found)} are there")
        times, key_times = [time for time, _ in found], {time for time, is_key in found if is_key}
        is_indexed = not SEEKABLE.isdisjoint(container.format.name.split(","))
        if not is_indexed or None in times or len(set(times)) < len(times):
            return Packets([None] * len(times), [0], float(stream.average_rate or 0))
        times.sort()
        keys = [index for index, time in enumerate(times) if index == 0 or time in key_times]
        return Packets(times, keys, float(stream.average_rate or 0))


def frames_at(file: str | BytesIO, packets: Packets, indices: Sequence[int], policy: Any) -> Iterator[tuple[int, Any]]:
    """Index and decoded frame at ascending indices, less those that cannot be decoded."""
    numbers = {time: index for index, time in enumerate(packets.times) if time is not None}
    with open_container(file, policy) as container:
        stream = video_streams(container)[0]
        stream.thread_type = "AUTO"
        stream.codec_context.options = decoder_limits(policy)
        frames, position = decode_all(container, stream), -1
        for done, index in enumerate(indices):
            key = packets.keys[bisect_right(packets.keys, index) - 1]
            must_seek = key > position + 1
            if must_seek:
                container.seek(packets.times[key], stream=stream)
                frames = decode_all(container, stream)
            while position < index:
                frame = next(frames, None)
                if frame is None and not must_seek:
                    return
                position = len(numbers) if frame is None else numbers.get(frame.pts, position + 1)
                if must_seek and position > key:
                    # the file's index points elsewhere: one pass from the start finds what is there
                    yield from frames_at(file, packets._replace(keys=[0]), indices[done:], policy)
                    return
                must_seek = False
            if position == index:
                yield index, frame


def decode_all(container: Any, stream: Any) -> Iterator[Any]:
    """Frames in display order from where the container stands."""
    for packet in read_packets(container, stream):
        # what a damaged packet breaks is missing, what follows is not
        with suppress(av.InvalidDataError):
            yield from packet.decode()
    with suppress(av.FFmpegError):  # already flushed, unless the file is cut
        yield from stream.decode(None)


def read_packets(container: Any, stream: Any) -> Iterator[Any]:
    """Packets up to the end of the file or to where it is cut."""
    with suppress(av.InvalidDataError):
        yield from container.demux(stream)
