"""Videos -> sampled frames, with PyAV alone.

- Frames are chosen as the original does: spread evenly, or at a rate (specs of NVILA's release; OpenCV's indices).
- A packet scan gives every frame's time and the key frames without decoding. Decoding then starts at the key frame
  before a wanted frame and skips what lies between: no more work than one pass, far less for sparse frames.
- Only formats that store the display time of every frame are sought in; of others the frames are counted.
- Frames are yielded one by one, so that a caller can shrink each before the next is decoded.
"""

import base64
import binascii
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
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
from .image_loading_vila import check_pixels, fetch_url, open_image

logger = logging.get_logger(__name__)

FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_FRAMES = 16384  # that are taken of one video
FPS_RANGE = (1e-6, 1e3)
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
    """

    video_max_tiles: int


class Packets(NamedTuple):
    """What a file says of its frames without decoding them.

    times: display times in ascending order; None where the format does not tell them reliably.
    keys: indices of the frames that decoding can start at.
    fps: average frames per second, 0 if unknown.
    """

    times: list[Any]
    keys: list[int]
    fps: float


def load_frames(source: Any, num_frames: int | None = None, fps: float | None = None) -> Iterator[Any]:
    """Frames of one video, in order; each a PIL picture or one of the arrays that were given.

    Args:
        source: path or URL of a file, its bytes, a data URI, a folder of pictures, a `(frames, H, W, 3)` array or a
            list of pictures.
        num_frames: how many to take, spread evenly over the video; short videos repeat frames. None takes all.
        fps: take that many per second instead, `num_frames` at most. Needs a file.

    Raises:
        ValueError: if there is no frame, no video stream, the file is broken or an option makes no sense.
    """
    if num_frames is not None:
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}")
        check_count(num_frames, "the given video")
    if fps and not FPS_RANGE[0] <= fps <= FPS_RANGE[1]:
        raise ValueError(f"fps must be 0 or {FPS_RANGE[0]:f} to {FPS_RANGE[1]:.0f} frames per second, got {fps}")
    if isinstance(source, (str, os.PathLike)) and os.path.isdir(source):
        files = sorted(path for path in Path(os.fsdecode(source)).iterdir() if path.suffix.lower() in FRAME_SUFFIXES)
        return choose(files, num_frames, fps, f"the folder {os.path.basename(os.path.abspath(source))!r}")
    if isinstance(source, (str, bytes, os.PathLike)):
        return decode_frames(open_video(source), num_frames, fps)
    return choose(source, num_frames, fps, "the given video")


def check_count(frames: int, name: str) -> None:
    if frames > MAX_FRAMES:
        raise ValueError(
            f"{frames} or more frames are asked of {name}, more than the limit MAX_FRAMES={MAX_FRAMES} of the video "
            "processing module: pass a smaller num_frames or fps, or raise the limit"
        )


def choose(frames: Any, num_frames: int | None, fps: float | None, name: str) -> Iterator[Any]:
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
    check_count(num_frames or len(frames), name)
    indices = range(len(frames)) if num_frames is None else sample_frames(len(frames), num_frames)
    to_frame = open_image if isinstance(frames[0], (str, bytes, os.PathLike)) else level_of(frames)
    return (to_frame(frames[index]) for index in indices)


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


def open_video(source: str | bytes | os.PathLike) -> str | BytesIO:
    """What PyAV opens: a path, or the bytes of a URL, a data URI or the caller.

    Raises:
        ValueError: if the file does not exist or the data URI is none.
    """
    if isinstance(source, bytes):
        return BytesIO(source)
    text = os.fsdecode(source)
    if text.startswith(("http://", "https://")):
        return BytesIO(fetch_url(text))
    if text.startswith("data:"):
        header, _, payload = text.partition(",")
        if not header.startswith("data:video/") or not header.endswith(";base64"):
            raise ValueError("a data URI must be of the form data:video/<type>;base64,<data>")
        try:
            return BytesIO(base64.b64decode(payload, validate=True))
        except binascii.Error as error:
            raise ValueError("the given data URI is not valid base64") from error
    if len(text) < 4096 and os.path.isfile(text):
        return os.path.abspath(text)  # a relative name may look like one of FFmpeg's protocols
    # only what has the suffix of a file name is shown: the rest may be somebody's data
    is_name = isinstance(source, os.PathLike) or (len(text) <= 200 and os.path.splitext(text)[1])
    raise ValueError("not an http(s) URL or an existing video file" + (f": {text!r}" if is_name else ""))


def decode_frames(file: str | BytesIO, num_frames: int | None, fps: float | None) -> Iterator[Image.Image]:
    """The sampled frames of a file; frames that cannot be decoded are left out, with a warning."""
    name = f"the video {os.path.basename(file)!r}" if isinstance(file, str) else "the given video"
    try:
        packets = scan_packets(file, name)
        total = len(packets.times)
        most = num_frames or (MAX_FRAMES + 1 if fps else total)
        indices = sample_frames(total, most, fps or 0.0, packets.fps)
        check_count(len(indices), name)
        repeats, missing = Counter(indices), len(indices)
        for index, frame in frames_at(file, packets, sorted(repeats)):
            check_pixels(frame.width, frame.height, f"decoding {name}")
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


def video_duration(source: str | bytes | os.PathLike) -> float | None:
    """Seconds of a video that `load_frames` opens; None if it has no frame rate, as a folder of pictures.

    Raises:
        ValueError: if it is broken or no video.
    """
    if not isinstance(source, bytes) and os.path.isdir(source):
        return None
    file = open_video(source)
    name = f"the video {os.path.basename(file)!r}" if isinstance(file, str) else "the given video"
    try:
        packets = scan_packets(file, name)
    except av.FFmpegError as error:
        raise ValueError(f"{name} is broken or no video") from error
    return len(packets.times) / packets.fps if packets.fps else None


def open_container(file: str | BytesIO) -> Any:
    if isinstance(file, BytesIO):
        file.seek(0)
    # a playlist would make FFmpeg read other files or URLs
    return av.open(file, options={"format_whitelist": FORMATS}, metadata_errors="replace")


def video_streams(container: Any) -> list[Any]:
    """Streams of moving pictures; the cover of a song is none."""
    return [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]


def scan_packets(file: str | BytesIO, name: str) -> Packets:
    """Reads a file's packets without decoding them.

    Raises:
        ValueError: if there is no video stream or no frame in it, or frames are too large.
    """
    with open_container(file) as container:
        if not (streams := video_streams(container)):
            raise ValueError(f"{name} has no video stream")
        stream = streams[0]
        if stream.codec_context is None:
            raise ValueError(f"{name} has an unknown codec")
        check_pixels(stream.width, stream.height, f"decoding {name}")
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


def frames_at(file: str | BytesIO, packets: Packets, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """Index and decoded frame at ascending indices, less those that cannot be decoded."""
    numbers = {time: index for index, time in enumerate(packets.times) if time is not None}
    with open_container(file) as container:
        stream = video_streams(container)[0]
        stream.thread_type = "AUTO"
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
                    yield from frames_at(file, packets._replace(keys=[0]), indices[done:])
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
