"""What the demo page's events call: chats and drawings through the processor and `generate()`, without gradio.

- Nothing is read but what was uploaded to the page, within the limits of a server's media policy.
- One `generate()` runs at a time, in a thread of its own; a reader who goes away ends it at its next step.
"""

import asyncio
import os
import tempfile
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from PIL import Image, ImageOps
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.utils import logging

from .commands_vila import USER_ERRORS, one_line
from .generation_vila_u import VilaUPictureStreamer
from .image_loading_vila import open_image
from .infer import VIDEO_SUFFIXES, clip_duration
from .loading_vila import Checkpoint, checkpoint_name
from .media_policy_vila import MediaPolicy

logger = logging.get_logger(__name__)

Message = dict[str, Any]


class Stopped(Exception):
    """Nobody waits for the picture any more."""


class StopWhen(StoppingCriteria):
    """Ends `generate()` at its next token when an event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


class Demo:
    """What the page's events call.

    Args:
        model_path: see `Checkpoint`.
        uploads: the only folder that media are read from; drawn videos are written there.
        policy_changes: see `MediaPolicy.changed`.

    Raises:
        OSError, ValueError: as `Checkpoint`, in words for the user.
    """

    def __init__(
        self,
        model_path: str | Path,
        uploads: str | Path,
        device: str | None = None,
        dtype: str = "auto",
        policy_changes: Any = None,
    ):
        checkpoint = Checkpoint(model_path)
        self.name = checkpoint_name(model_path)
        self.draws = checkpoint.family.model_type == "vila_u"
        self.looks = checkpoint.family.model_type == "vila_hd"
        self.uploads = uploads
        self.policy = MediaPolicy.server(paths=True, root=uploads).changed(policy_changes)
        self.processor: Any = checkpoint.load_processor()
        self.processor.media_policy = self.policy
        self.model: Any = checkpoint.load_model(self.processor, device, dtype)
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")

    async def run(
        self, generate: Callable[[], Any], pieces: Any, stopped: threading.Event
    ) -> AsyncGenerator[Any, None]:
        """Yields what `generate` puts into a queue until it ends; when the reader goes away, `stopped` is set."""
        future = self.worker.submit(generate)
        future.add_done_callback(lambda _: pieces.put(None))
        try:
            while (piece := await asyncio.to_thread(pieces.get)) is not None:
                yield piece
            await asyncio.wrap_future(future)  # raises what `generate` raised
        finally:
            stopped.set()
            future.cancel()

    async def answer(
        self, message: Message, history: list[Message], max_new_tokens: float, temperature: float, looks: Any = None
    ) -> AsyncGenerator[Any, None]:
        """Yields the answer as it grows, for `gr.ChatInterface`; of a VILA-HD with the pictures of where it looked.

        Errors are shown in the chat, and what they are about is left out of it from then on.
        """
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stopped = threading.Event()
        chat: list[Message] = []
        overlays: list[Image.Image] = []
        options = {**sampling(temperature), "max_new_tokens": int(max_new_tokens), "streamer": streamer}
        options["stopping_criteria"] = StoppingCriteriaList([StopWhen(stopped)])

        def generate() -> None:
            inputs = self.encode(chat)
            if not self.looks:
                self.model.generate(**inputs, **options)
                return
            output = self.model.generate(
                **inputs, **options, num_look_close=looks and int(looks), output_selection_maps=True
            )
            overlays.extend(self.overlays(chat, output.selection_maps))

        def shown(content: Any) -> Any:
            return (content, overlays) if self.looks else content

        try:
            chat += to_chat(history, message)
            text = ""
            async with aclosing(self.run(generate, streamer.text_queue, stopped)) as pieces:
                async for piece in pieces:
                    text += piece
                    # a page that is slower than the model shows the latest words
                    if text.strip() and streamer.text_queue.empty():
                        yield shown(text)
            if not text.strip():
                yield shown(failure("Not answered", "The model ended its answer before the first word."))
            else:
                duration = clip_duration([block for turn in chat for block in turn["content"]], self.processor)
                yield shown(text if duration is None else self.processor.decode_times(text, duration))
        except Exception as error:
            yield shown(failure(f"Not answered: {type(error).__name__}", explain(error)))

    def encode(self, chat: list[Message]) -> Any:
        """A chat as arguments of `generate()`.

        Raises:
            ValueError: if the media policy refuses a file, or it is no longer there.
        """
        for block in [block for turn in chat for block in turn["content"] if block["type"] != "text"]:
            if self.policy.readable_file(block["path"]) is None:
                raise ValueError(f"{Path(block['path']).name} is no longer on the server: upload it again.")
        return self.processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)

    def overlays(self, chat: list[Message], maps: Any) -> list[Image.Image]:
        """The chat's pictures with what was looked at in colour; those behind a video, whose frames count, are not."""
        drawn: list[Image.Image] = []
        for block in [block for turn in chat for block in turn["content"] if block["type"] != "text"]:
            if block["type"] == "video" or maps is None:
                break
            picture = ImageOps.exif_transpose(open_image(block["path"], self.policy).to_image(self.policy))
            drawn.append(self.processor.draw_selection(picture, maps, index=len(drawn)))
        return drawn

    async def draw(
        self, prompt: str, negative: str, mode: str, count: float, frames: float, guidance: float, seed: str
    ) -> AsyncGenerator[tuple[list[Image.Image], str | None], None]:
        """Yields the pictures, or of a video the frame, that are being drawn; at last all, and the video's file."""
        stopped, pieces = threading.Event(), SimpleQueue[Any]()
        drawn: list[Any] = []
        generator = torch.Generator(self.model.device)
        generator.manual_seed(parse_seed(seed)) if seed.strip() else generator.seed()

        def show(pixels: torch.Tensor) -> None:
            if stopped.is_set():
                raise Stopped
            # gradio names files by their content: one that comes again would be rewritten while it is fetched
            if pixels.shape[-2] < pixels.shape[-1]:
                pieces.put(self.processor.post_process_multimodal_output(pixels, generation_mode="image"))

        def generate() -> None:
            inputs = self.processor(
                text=[prompt], negative_text=negative or None, generation_mode=mode, return_tensors="pt"
            )
            output = self.model.generate(
                **inputs.to(self.model.device),
                generation_mode=mode,
                guidance_scale=guidance,
                num_return_sequences=int(count) if mode == "image" else 1,
                num_frames=int(frames) if mode == "video" else None,
                generator=generator,
                streamer=VilaUPictureStreamer(self.model, show),
            )
            drawn.extend(self.processor.post_process_multimodal_output(output.pixel_values, generation_mode=mode))

        async with aclosing(self.run(generate, pieces, stopped)) as shown:
            async for pictures in shown:
                if pieces.empty():
                    yield pictures, None
        if mode == "image":
            yield drawn, None
            return
        handle, path = tempfile.mkstemp(suffix=".mp4", dir=self.uploads)
        os.close(handle)
        self.processor.save_video(drawn[0], path)
        yield drawn[0], path


def sampling(temperature: float) -> dict[str, Any]:
    """Arguments of `generate()`; 0 takes the likeliest token."""
    if temperature:
        return {"do_sample": True, "temperature": float(temperature)}
    return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def parse_seed(text: str) -> int:
    if not text.strip().isdecimal() or int(text) >= 2**63:
        raise ValueError("The seed must be a whole number of at least 0.")
    return int(text)


def failure(title: str, text: str) -> Message:
    """A message of the page, not of the model; `to_chat` knows it by its title."""
    return {"role": "assistant", "content": text, "metadata": {"title": title}}


def explain(error: Exception) -> str:
    """What a visitor is told."""
    if isinstance(error, USER_ERRORS):
        return one_line(error)
    logger.error("A visitor's request failed.", exc_info=error)
    return "This should not have happened; the server's log tells more."


def to_chat(history: list[Message], message: Message) -> list[Message]:
    """Gradio's messages -> those of `apply_chat_template`, media by their files.

    Turns that failed are left out; what was said without an answer belongs to the next turn of the same role.

    Raises:
        ValueError: if the new message is empty.
    """
    chat: list[Message] = []

    def add(role: str, parts: list[Any]) -> None:
        blocks = [block for block in map(to_block, parts) if block is not None]
        if blocks and chat and chat[-1]["role"] == role:
            chat[-1]["content"] += blocks
        elif blocks:
            chat.append({"role": role, "content": blocks})

    for entry in history:
        if (entry.get("metadata") or {}).get("title"):
            chat = chat[:-1] if chat and chat[-1]["role"] == "user" else chat
        else:
            content = entry["content"]
            add(entry["role"], content if isinstance(content, list) else [content])
    files = [file if isinstance(file, dict) else {"path": file} for file in message.get("files") or []]
    parts = [*files, message.get("text") or ""]
    if not any(map(to_block, parts)):
        raise ValueError("The message is empty: write something, or add a picture or video.")
    add("user", parts)
    return chat


def to_block(part: Any) -> Message | None:
    """A part of one of gradio's messages: text, or a dictionary of text or of a file's path."""
    text = part if isinstance(part, str) else part.get("text")
    if text is not None:
        return {"type": "text", "text": text} if text.strip() else None
    path = (part.get("file") or part).get("path")
    if path is None:
        return None
    return {"type": "video" if Path(path).suffix.lower() in VIDEO_SUFFIXES else "image", "path": path}
