"""Which picture or video belongs to which prompt."""

from typing import Any

from PIL import Image

from .image_processing_vila import group_by_conversation


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
