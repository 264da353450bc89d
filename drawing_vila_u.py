"""Drawing from the command line's options: files in a folder, their names on stdout."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .loading_vila import Checkpoint


class RowProgress:
    """A streamer for `generate()` that counts rows on a progress bar."""

    def __init__(self, total: int):
        self.progress = logging.tqdm(total=total, desc="Drawing", unit="row")

    def put(self, codes: Any) -> None:
        self.progress.update()

    def end(self) -> None:
        self.progress.close()


def draw(options: argparse.Namespace) -> None:
    """One prompt -> `image_0.png`, ... or `video_0.mp4`, ... in a folder.

    Raises:
        OSError, ValueError: in words for the user.
    """
    checkpoint = Checkpoint(options.model_path, options.conv_mode)
    if checkpoint.family.model_type != "vila_u":
        raise ValueError(f"{options.model_path} cannot draw: --prompt is for VILA-U checkpoints")
    mode = "video" if options.video_generation else "image"
    processor: Any = checkpoint.load_processor()
    inputs = processor(text=[options.prompt], generation_mode=mode, return_tensors="pt")
    folder = Path(options.save_path)
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = checkpoint.load_model(processor, options.device, options.dtype, options.lora_path)
    frames: Any = None
    if mode == "video":
        frames = options.num_video_frames if options.num_video_frames > 0 else processor.num_video_frames
    if options.seed is not None:
        torch.manual_seed(options.seed)
    drawn = model.generate(
        **inputs.to(model.device),
        generation_mode=mode,
        num_return_sequences=options.generation_nums,
        num_frames=frames,
        guidance_scale=options.cfg,
        streamer=RowProgress(model.config.code_grid[0] * (frames or 1)),
        **sampling_options(options),
    )
    pictures = processor.post_process_multimodal_output(drawn.pixel_values, generation_mode=mode)
    for number, picture in enumerate(pictures):
        if mode == "video":
            path = folder / f"video_{number}.mp4"
            processor.save_video(picture, path)
        else:
            path = folder / f"image_{number}.png"
            picture.save(path)
        sys.stdout.write(f"{path}\n")


def sampling_options(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `generate()`; what the user does not name is the checkpoint's choice."""
    if options.temperature == 0:
        return {"do_sample": False}
    given = {"temperature": options.temperature, "top_p": options.top_p}
    return {name: value for name, value in given.items() if value is not None}
