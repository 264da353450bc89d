"""Asks a VILA checkpoint about pictures and videos, or a VILA-U for some, on the command line: `vila-infer`.

The answer, or the names of the files that were drawn, and nothing else, goes to stdout as it is written; progress,
warnings and errors go to stderr.
"""

import argparse
import importlib.util
import json
import os
import re
import sys
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from PIL import Image, UnidentifiedImageError
from transformers import TextStreamer
from transformers.utils import logging

from .chat_templates_vila import CONV_MODES
from .commands_vila import INTERRUPTED, PIPE_CLOSED, USER_ERRORS, one_line
from .configuration_vila_hd import LOOK_CLOSE_MODES
from .drawing_vila_u import draw
from .families_vila import VILA
from .loading_vila import DTYPES, Checkpoint
from .looking_vila_hd import LookOptions
from .media_policy_vila import MediaPolicy
from .media_sources_vila import fetch_url
from .media_vila import LONG_VIDEO_FRAMES
from .processing_vila import VilaProcessor
from .structured_output_vila import json_grammar, json_processors
from .video_processing_vila import video_duration

logger = logging.get_logger(__name__)

# options that do nothing in the other use of the command
OF_DRAWING = ("video_generation", "save_path", "generation_nums", "cfg")
OF_ANSWERS = (
    *(own.name for own in fields(LookOptions)),
    *("video_max_tiles", "media_policy", "json_mode", "json_schema", "max_new_tokens"),
)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".m4v", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".ogv", ".3gp")

# behind a blank or an ideograph; what follows may still change with the next token
WORD_END = re.compile(r".*[\s\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]", re.DOTALL)


class AnswerStreamer(TextStreamer):
    """Writes an answer word by word to stdout, without blanks around it, times as seconds.

    Args:
        duration: seconds of the video that time tokens refer to; None leaves them as they are.
    """

    def __init__(self, processor: VilaProcessor, duration: float | None = None):
        super().__init__(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.processor, self.duration = processor, duration
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt's ids, then those of every step."""
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        self.token_cache += value.flatten().tolist()
        # all of the answer each time: what sentencepiece makes of a blank depends on what stands before it
        self.text = str(self.tokenizer.decode(self.token_cache, **self.decode_kwargs)).strip()
        words = WORD_END.match(self.text)
        self.write(len(words[0].rstrip()) if words else 0)

    def end(self) -> None:
        """Writes the rest and a line break."""
        self.write(len(self.text))
        sys.stdout.write("\n")
        sys.stdout.flush()

    def write(self, end: int) -> None:
        """Writes the answer up to a position."""
        piece = self.text[self.print_len : end]
        self.print_len = max(self.print_len, end)
        if self.duration is not None:
            piece = self.processor.decode_times(piece, self.duration)
        if piece:
            sys.stdout.write(piece)
            sys.stdout.flush()


def answer(options: argparse.Namespace) -> None:
    """One question, from the command line's options to the answer on stdout.

    Raises:
        OSError, ValueError: in words for the user.
    """
    policy = MediaPolicy().changed(options.media_policy)
    media = [media_block(source, policy) for source in options.media]
    schema = read_schema(options.json_schema) if options.json_schema else None
    wants_json = options.json_mode or schema is not None
    if wants_json:
        json_grammar(schema)  # what is wrong with it is told now, not when the model is there
    checkpoint = Checkpoint(options.model_path, options.conv_mode)
    processor = checkpoint.load_processor()
    processor.media_policy = policy
    if options.num_video_frames > 0:
        processor.num_video_frames = options.num_video_frames
    if options.video_max_tiles > 0:
        processor.video_max_tiles = options.video_max_tiles
    duration = clip_duration(media, processor)
    # of a long video only a few frames at a time are held; of a short one all are read before the weights are
    streams = checkpoint.family is VILA and processor.video_max_tiles == 1
    streams = streams and processor.num_video_frames > LONG_VIDEO_FRAMES
    # before the weights are read, which may take minutes
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*media, *([{"type": "text", "text": options.text}] if options.text else [])]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"stream_frames": streams},
    )
    model = checkpoint.load_model(processor, options.device, options.dtype, options.lora_path)
    generation = generation_options(options)
    if wants_json:
        generation["logits_processor"] = json_processors(model, processor, schema)
    if options.seed is not None:
        torch.manual_seed(options.seed)
    streamer = AnswerStreamer(processor, duration)
    model.generate(**inputs.to(model.device), **generation, streamer=streamer)
    if wants_json and not is_json(streamer.text):
        raise ValueError("the answer ended before its JSON was complete: raise --max-new-tokens")


def media_block(source: str, policy: MediaPolicy) -> dict[str, Any]:
    """A file, a folder of frames or a URL as a part of a message.

    A URL whose path does not tell what it is gets fetched, once, and is looked at.

    Raises:
        FileNotFoundError, ValueError: if it does not exist, cannot be fetched, or is neither picture nor video.
    """
    is_url = source.startswith(("http://", "https://"))
    suffix = Path(urlsplit(source).path if is_url else source).suffix.lower()
    if not is_url and not os.path.exists(source):
        raise FileNotFoundError(f"{source} does not exist")
    if not is_url and os.path.isdir(source):
        return {"type": "video", "path": source}
    if suffix in IMAGE_SUFFIXES:
        return {"type": "image", "url" if is_url else "path": source}
    if suffix in VIDEO_SUFFIXES:
        return {"type": "video", "url" if is_url else "path": source}
    if not is_url:
        known = " ".join((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))
        raise ValueError(f"{source} is neither a picture nor a video by its name; known are {known}")
    data = fetch_url(source, policy)
    return {"type": "image", "image": data} if is_picture(data) else {"type": "video", "video": data}


def is_picture(data: bytes) -> bool:
    try:
        return Image.open(BytesIO(data)).format != "MPEG"  # which Pillow names, but cannot decode
    except UnidentifiedImageError:
        return False
    except Exception:  # a broken header, or more pixels than Pillow opens: for the processor to tell
        return True


def clip_duration(media: list[dict[str, Any]], processor: VilaProcessor) -> float | None:
    """Seconds of the one video, for checkpoints that answer with times; else None.

    A video at a URL is fetched now, and its bytes take the URL's place.
    """
    videos = [block for block in media if block["type"] == "video"]
    if processor.num_time_tokens < 2 or not videos:
        return None
    if url := videos[0].pop("url", None):
        videos[0]["video"] = fetch_url(url, processor.media_policy)
    source = videos[0].get("video") or videos[0]["path"]
    duration = video_duration(source, processor.media_policy) if len(videos) == 1 else None
    if duration is None:
        logger.warning("Times in the answer stay time tokens: seconds need exactly one video, with a frame rate.")
    return duration


def read_schema(path: str) -> dict[str, Any]:
    """A JSON schema from a `.json` file, or of the pydantic class `Main` in a `.py` file, which is run.

    Raises:
        OSError, ValueError: if there is none.
    """
    file = Path(path)
    if file.suffix.lower() != ".py":
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not file.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    spec: Any = importlib.util.spec_from_file_location("vila_json_schema", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pydantic looks up there what annotations name
    try:
        spec.loader.exec_module(module)
        main: Any = getattr(module, "Main", None)
        schema = main.model_json_schema() if hasattr(main, "model_json_schema") else None
    except Exception as error:  # whatever the user's code raises
        raise ValueError(f"{path} cannot be used: {type(error).__name__}: {error}") from error
    if schema is None:
        raise ValueError(f"{path} has no class Main(pydantic.BaseModel)")
    return schema


def generation_options(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `generate()`; what the user does not name is the checkpoint's choice."""
    looks = {own.name: getattr(options, own.name) for own in fields(LookOptions)}
    generation: dict[str, Any] = {name: value for name, value in looks.items() if value is not None}
    if options.max_new_tokens is not None:
        generation["max_new_tokens"] = options.max_new_tokens
    if options.temperature == 0:
        return {**generation, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    sampling = {"temperature": options.temperature, "top_p": options.top_p}
    if sampling := {name: value for name, value in sampling.items() if value is not None}:
        generation |= {"do_sample": True, **sampling}
    return generation


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def number(kind: type, low: float, high: float = float("inf"), *, or_default: bool = False) -> Any:
    """An argparse type: a number from `low` to `high`, or -1 for the checkpoint's own where that is allowed."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (low <= value <= high or (or_default and value == -1)):
            raise argparse.ArgumentTypeError(f"{text} is out of range")
        return value

    parse.__name__ = kind.__name__  # argparse names it where `kind` refuses
    return parse


def count_or_all(text: str) -> int | str:
    """An argparse type: a number of at least 0, or `all`."""
    return text if text == "all" else number(int, 0)(text)


def numbers(text: str) -> list[int]:
    """An argparse type: `512+2048`."""
    return [int(part) for part in text.split("+")]


def yes_or_no(text: str) -> bool:
    """An argparse type."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def policy_change(text: str) -> Any:
    """An argparse type: a word, or a JSON object of the fields of `MediaPolicy` to change."""
    change = json.loads(text) if text.startswith("{") else text
    try:
        MediaPolicy().changed(change)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return change


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vila-infer",
        description=__doc__.split("\n")[0],
        epilog="Flags may be spelled with underscores or dashes.",
        allow_abbrev=False,
    )
    count = number(int, 1, or_default=True)
    add = parser.add_argument
    add("-m", "--model-path", required=True, metavar="PATH", help="converted or original folder or Hub id")
    add("-l", "--lora-path", metavar="DIR", help="LoRA adapter that is merged into the weights")
    add("-c", "--conv-mode", choices=CONV_MODES, default="auto", help="chat template (default: the checkpoint's)")
    add("--text", "--query", help="question; stands behind the media")
    add(
        "--media",
        "--image-path",
        "--video-path",
        nargs="+",
        action="extend",
        default=[],
        help="pictures, videos and folders of frames: files or URLs",
    )
    add("--prompt", help="what a VILA-U is to draw")
    add("--video-generation", type=yes_or_no, nargs="?", const=True, default=False, help="draw a video")
    add(
        "--save-path", default="generated_images", metavar="DIR", help="folder of what is drawn (default: %(default)s)"
    )
    add("--generation-nums", type=number(int, 1), default=1, metavar="N", help="how many are drawn")
    add("--cfg", type=number(float, 1e-6), metavar="SCALE", help="guidance scale of drawing (default: 3)")
    add("--media-policy", type=policy_change, metavar="JSON", help="limits to change: '{\"max_frames\": 100000}'")
    add("-nf", "--num-video-frames", type=count, default=-1, metavar="N", help="frames that are taken of a video")
    add("-vm", "--video-max-tiles", type=count, default=-1, metavar="N", help="tiles that a frame is cut into at most")
    add("--num-look-close", type=count_or_all, metavar="N", help="VILA-HD: looks at a picture, or all")
    add("--num-token-look-close", type=count_or_all, metavar="N", help="VILA-HD: patches to look at instead, or all")
    add("--select-num-each-scale", type=numbers, metavar="N+N", help="VILA-HD: patches of a look at each scale")
    add("--look-close-mode", choices=LOOK_CLOSE_MODES, help="VILA-HD: choose patches with or without the question")
    add("--smooth-selection-prob", action="store_const", const=True, help="VILA-HD: choose patches in blocks")
    add("--json-mode", action="store_true", help="answer with JSON")
    add("--json-schema", metavar="FILE", help=".json schema, or .py with a pydantic class Main, that the answer obeys")
    add("--max-new-tokens", type=number(int, 1), metavar="N", help="tokens of the answer at most")
    add("--temperature", metavar="T", type=number(float, 0), help="sample with it; 0 takes the likeliest token")
    add("--top-p", metavar="P", type=number(float, 1e-6, 1), help="sample from the likeliest tokens, of that sum")
    add("--seed", type=number(int, 0, 2**63 - 1), metavar="N", help="makes sampling repeatable")
    add("--device", help="cuda, cuda:1, mps, cpu ... (default: the best that is there)")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights (default: the checkpoint's)")
    options = parser.parse_args([with_dashes(argument) for argument in arguments])
    if options.prompt is not None and (options.text is not None or options.media):
        parser.error("--prompt draws, --text and --media ask: give either")
    if options.prompt is None and options.text is None and not options.media:
        parser.error("give --text, --media or both, or --prompt")
    use, others = ("--prompt draws", OF_ANSWERS) if options.prompt is not None else ("--text asks", OF_DRAWING)
    if useless := [name for name in others if getattr(options, name) != parser.get_default(name)]:
        parser.error(f"{use}, without --{', --'.join(useless).replace('_', '-')}")
    if options.temperature == 0 and options.top_p is not None:
        parser.error("--top-p needs a --temperature above 0")
    return options


def with_dashes(argument: str) -> str:
    """A flag's name with dashes for underscores; what is no flag stays."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        (answer if options.prompt is None else draw)(options)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # what reads the answer has gone: nothing that Python still flushes at its end may complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(PIPE_CLOSED)
    except USER_ERRORS as error:
        message, bar, table = str(error).partition("\n|")  # what would fit, where the prompt does not
        sys.exit(f"vila-infer: {one_line(message)}{bar}{table}")


if __name__ == "__main__":
    main()
