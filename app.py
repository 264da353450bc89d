"""A web page to chat with a VILA checkpoint about pictures and videos: `vila-demo`, or `python app.py` in a Space.

What a visitor does is answered by `demo_vila.py`; here is what the page looks like, and the command.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
if not __package__:  # run as a script: this folder, whatever its name, is the package (PEP 366)
    spec: Any = importlib.util.spec_from_file_location(
        "vila", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    sys.modules["vila"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["vila"])
    __package__ = "vila"

from .commands_vila import USER_ERRORS, one_line
from .demo_vila import Demo, Message, explain
from .infer import policy_change
from .loading_vila import DTYPES

DEFAULT_MODEL = FOLDER / "checkpoints" / "vila-nano"
EXAMPLES = FOLDER / "examples" / "chats"
MAX_NEW_TOKENS, DEFAULT_NEW_TOKENS = 4096, 512
MAX_LOOKS = 8
MAX_DRAWN = 4
MAX_WAITING = 32  # visitors who queue; others are told to come back
DELETE_UPLOADS = (600, 86400)  # every ten minutes those that are older than a day


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
    outputs: list[Any] = []
    settings: list[Any] = [
        gr.Slider(1, MAX_NEW_TOKENS, own_limit, step=1, label="Tokens of an answer at most", render=False),
        gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: always the likeliest token)", render=False),
    ]
    if demo.looks:
        own_looks = demo.model.config.num_look_close
        looks = own_looks if isinstance(own_looks, int) else 1  # "all", or a number of patches instead
        settings.append(gr.Slider(0, MAX_LOOKS, looks, step=1, label="Close looks at every picture", render=False))
        outputs.append(gr.Gallery(label="Where it looked closely", object_fit="contain", columns=3, render=False))
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
    """Chats of `examples/chats` by title: what stands before the last question, and that. None without that folder."""
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

    async def draw(*arguments: Any) -> AsyncGenerator[Any, None]:
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
    own = DEFAULT_MODEL if DEFAULT_MODEL.is_dir() else None
    whose = "converted or original folder or Hub id (default: $VILA_MODEL, else the vila-nano of a clone)"
    add("-m", "--model-path", default=os.environ.get("VILA_MODEL") or own, metavar="PATH", help=whose)
    add("--device", help="cuda, cuda:1, mps, cpu ... (default: the best that is there)")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights (default: the checkpoint's)")
    add("--media-policy", type=policy_change, metavar="JSON", help="limits to change: '{\"max_frames\": 1024}'")
    add("--host", metavar="ADDRESS", help="to listen at (default: $GRADIO_SERVER_NAME, else 127.0.0.1)")
    add("--port", type=int, help="default: $GRADIO_SERVER_PORT, else the first free one from 7860 on")
    add("--share", action="store_true", help="also at a public address, through gradio's tunnel")
    options = parser.parse_args(arguments)
    if options.model_path is None:
        parser.error("give --model-path, or set $VILA_MODEL")
    return options


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
            address = {"server_name": options.host, "server_port": options.port, "share": options.share}
            build_page(demo).launch(**address, allowed_paths=[str(EXAMPLES)], max_file_size=demo.policy.max_bytes)
        except USER_ERRORS as error:
            sys.exit(f"vila-demo: {one_line(error)}")


if __name__ == "__main__":
    main()
