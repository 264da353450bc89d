"""A web page to chat with a VILA checkpoint about pictures and videos: `vila-demo`, or `python app.py` in a Space.

- A thin caller of the processor and `generate()`; VILA-U gets a tab to draw in, VILA-HD shows where it looked.
- Nothing is read but what was uploaded to the page, within the limits of a server's media policy.
- One `generate()` runs at a time, in a thread of its own; Stop, or a visitor who leaves, ends it at its next step.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from PIL import Image, ImageOps
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.utils import logging

FOLDER = Path(__file__).resolve().parent
if not __package__:  # run as a script: this folder, whatever its name, is the package (PEP 366)
    spec: Any = importlib.util.spec_from_file_location(
        "vila", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    sys.modules["vila"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["vila"])
    __package__ = "vila"

from .generation_vila_u import VilaUPictureStreamer
from .image_loading_vila import open_image
from .infer import USER_ERRORS, VIDEO_SUFFIXES, clip_duration, policy_change
from .loading_vila import DTYPES, Checkpoint, checkpoint_name
from .media_policy_vila import MediaPolicy

logger = logging.get_logger(__name__)

DEFAULT_MODEL = FOLDER / "checkpoints" / "vila-nano"
EXAMPLES = FOLDER / "examples" / "demo"
MAX_NEW_TOKENS, DEFAULT_NEW_TOKENS = 4096, 512
MAX_LOOKS = 8
MAX_DRAWN = 4
MAX_WAITING = 32  # visitors who queue; others are told to come back
DELETE_UPLOADS = (600, 86400)  # every ten minutes those that are older than a day

Message = dict[str, Any]


class Stopped(Exception):
    """Nobody waits for the picture any more."""


class StopWhen(StoppingCriteria):
    """Ends `generate()` at its next token when an event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


class Demo:
    """What the page's events call.

    Args:
        model_path: see `Checkpoint`.
        uploads: the only folder that media are read from.
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
        self.policy = MediaPolicy.server(paths=True, root=uploads).changed(policy_changes)
        self.processor: Any = checkpoint.load_processor()
        self.processor.media_policy = self.policy
        self.model: Any = checkpoint.load_model(self.processor, device, dtype)
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")

    async def run(self, generate: Callable[[], Any], pieces: Any, stopped: threading.Event) -> AsyncIterator[Any]:
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
    ) -> AsyncIterator[Any]:
        """Yields the answer as it grows, for `gr.ChatInterface`; of a VILA-HD with the pictures of where it looked.

        Errors are shown in the chat, and what they are about is left out of it from then on.
        """
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stopped, chat, overlays = threading.Event(), [], []
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
        drawn = []
        for block in [block for turn in chat for block in turn["content"] if block["type"] != "text"]:
            if block["type"] == "video" or maps is None:
                break
            picture = ImageOps.exif_transpose(open_image(block["path"], self.policy).to_image(self.policy))
            drawn.append(self.processor.draw_selection(picture, maps, index=len(drawn)))
        return drawn

    async def draw(
        self, prompt: str, negative: str, mode: str, count: float, frames: float, guidance: float, seed: str
    ) -> AsyncIterator[tuple[list[Image.Image], str | None]]:
        """Yields the pictures, or of a video the frame, that are being drawn; at last all, and the video's file."""
        stopped, pieces, drawn = threading.Event(), SimpleQueue[Any](), []
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
        handle, path = tempfile.mkstemp(suffix=".mp4")
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
        return " ".join(str(error).split())
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


def build_page(demo: Demo) -> Any:
    """The page as `gr.Blocks`, to be launched."""
    import gradio as gr

    with gr.Blocks(title=f"VILA: {demo.name}", analytics_enabled=False, delete_cache=DELETE_UPLOADS) as page:
        gr.Markdown(
            f"# {demo.name}\nAsk about pictures and videos, several in one message if you like. Correct an answer by "
            "editing it, and it becomes an example for the next."
        )
        if demo.draws:
            with gr.Tab("Chat"):
                chat_area(demo)
            with gr.Tab("Draw"):
                draw_area(demo)
        else:
            chat_area(demo)
    return page.queue(max_size=MAX_WAITING)


def chat_area(demo: Demo) -> None:
    import gradio as gr

    own_limit = demo.model.generation_config.max_new_tokens or DEFAULT_NEW_TOKENS
    settings = [
        gr.Slider(1, MAX_NEW_TOKENS, own_limit, step=1, label="Tokens of an answer at most", render=False),
        gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: always the likeliest token)", render=False),
    ]
    outputs = []
    if demo.looks:
        looks = demo.model.config.num_look_close
        settings.append(gr.Slider(0, MAX_LOOKS, looks, step=1, label="Close looks at every picture", render=False))
        outputs.append(gr.Gallery(label="Where it looked closely", object_fit="contain", height=260, render=False))
    chatbot = gr.Chatbot(
        show_label=False,
        height=520,
        editable="all",
        feedback_options=None,
        buttons=["copy"],
        placeholder="Add pictures or a video, and ask.",
    )
    chat = gr.ChatInterface(
        demo.answer,
        multimodal=True,
        chatbot=chatbot,
        textbox=gr.MultimodalTextbox(
            file_count="multiple",
            file_types=["image", "video"],
            placeholder="A question, with pictures or videos",
            show_label=False,
            stop_btn=True,
        ),
        additional_inputs=settings,
        additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
        additional_outputs=outputs,
    )
    chatbot.edit(keep, chatbot, chat.chatbot_state, api_visibility="private", queue=False)
    for output in outputs:
        output.render()
    if examples := read_examples():
        titles = list(examples)
        dataset = gr.Dataset(
            components=["textbox"],
            samples=[[title] for title in titles],
            label="Examples: questions to send, one behind a chat that teaches",
            type="index",
        )
        dataset.click(
            lambda index: examples[titles[index]],
            dataset,
            [chatbot, chat.textbox],
            api_visibility="private",
            queue=False,
        ).then(keep, chatbot, chat.chatbot_state, api_visibility="private", queue=False)


def keep(history: list[Message]) -> list[Message]:
    """What the chat shows becomes what the next question continues: `gr.ChatInterface` keeps the two apart."""
    return history


def read_examples() -> dict[str, tuple[list[Message], Message]]:
    """Chats of `examples/demo` by title: what stands before the last question, and that. None without that folder."""
    if not (EXAMPLES / "chats.jsonl").is_file():
        return {}

    def shown(block: Message) -> Any:
        return block["text"] if block["type"] == "text" else {"path": str(EXAMPLES / block["path"])}

    found = {}
    for line in (EXAMPLES / "chats.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        *history, last = [
            {"role": turn["role"], "content": [shown(block) for block in turn["content"]]} for turn in row["messages"]
        ]
        files = [part["path"] for part in last["content"] if isinstance(part, dict)]
        text = " ".join(part for part in last["content"] if isinstance(part, str))
        found[row["title"]] = history, {"text": text, "files": files}
    return found


def draw_area(demo: Demo) -> None:
    import gradio as gr

    async def draw(*arguments: Any) -> AsyncIterator[Any]:
        try:
            async with aclosing(demo.draw(*arguments)) as shown:
                async for pictures, video in shown:
                    yield pictures, gr.Video(video, visible=video is not None)
        except Exception as error:
            raise gr.Error(explain(error), title=type(error).__name__, duration=None) from error

    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox(label="What to draw", lines=3)
            negative = gr.Textbox(label="What to move away from (by default an empty request)")
            mode = gr.Radio([("Pictures", "image"), ("A video", "video")], value="image", label="As")
            count = gr.Slider(1, MAX_DRAWN, 1, step=1, label="How many pictures")
            frames = gr.Slider(1, 16, demo.processor.num_video_frames, step=1, label="Frames of the video")
            guidance = gr.Slider(1, 10, 3, step=0.5, label="Guidance scale")
            seed = gr.Textbox(label="Seed (by default another one each time)")
            with gr.Row():
                start, stop = gr.Button("Draw", variant="primary"), gr.Button("Stop", variant="stop")
        with gr.Column():
            pictures = gr.Gallery(label="Drawn", object_fit="contain", height=480, format="png")
            video = gr.Video(label="The video", visible=False, autoplay=True, loop=True)
    inputs = [prompt, negative, mode, count, frames, guidance, seed]
    drawing = gr.on([start.click, prompt.submit], draw, inputs, [pictures, video], api_name="draw")
    stop.click(None, cancels=drawing)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vila-demo", description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add(
        "-m",
        "--model-path",
        default=os.environ.get("VILA_MODEL") or DEFAULT_MODEL,
        metavar="PATH",
        help="converted or original folder or Hub id (default: $VILA_MODEL, else the vila-nano of a clone)",
    )
    add("--device", help="cuda, cuda:1, mps, cpu ... (default: the best that is there)")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights (default: the checkpoint's)")
    add("--media-policy", type=policy_change, metavar="JSON", help="limits to change: '{\"max_frames\": 1024}'")
    add("--host", metavar="ADDRESS", help="to listen at (default: $GRADIO_SERVER_NAME, else 127.0.0.1)")
    add("--port", type=int, help="default: $GRADIO_SERVER_PORT, else the first free one from 7860 on")
    add("--share", action="store_true", help="also at a public address, through gradio's tunnel")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    if importlib.util.find_spec("gradio") is None:
        sys.exit("vila-demo: the page needs gradio: pip install 'vila-hf[demo]'")
    with tempfile.TemporaryDirectory(prefix="vila-demo-") as uploads:
        # gradio reads it when it is imported; a folder of our own holds the uploads of this page alone
        uploads = os.environ.setdefault("GRADIO_TEMP_DIR", uploads)
        try:
            os.makedirs(uploads, exist_ok=True)
            demo = Demo(options.model_path, uploads, options.device, options.dtype, options.media_policy)
            build_page(demo).launch(
                server_name=options.host,
                server_port=options.port,
                share=options.share,
                allowed_paths=[str(EXAMPLES)],
                max_file_size=demo.policy.max_bytes,
            )
        except USER_ERRORS as error:
            sys.exit(f"vila-demo: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
