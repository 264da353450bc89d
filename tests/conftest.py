"""Where the golden data and media lie, and converted checkpoints that tests share."""

import copy
import json
import os
import threading
from contextlib import contextmanager
from functools import cache, cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from processing_requests import TEMPLATES, tiling_processor
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor
from vila.conversion_vila import convert
from vila.modeling_vila import VilaForConditionalGeneration
from vila.processing_vila import VilaProcessor

# the models are so small that threads only wait for each other
torch.set_num_threads(1)

# helpers that assert: a failure shows its values, as in a test
pytest.register_assert_rewrite("chat_requests", "generation_requests", "picture_inputs")

REPOSITORY = Path(__file__).resolve().parents[1]
COMMITTED_GOLDENS = REPOSITORY / "tests" / "goldens"
GOLDENS = Path(os.environ.get("VILA_GOLDENS", REPOSITORY.parent / "shared" / "goldens"))
if not GOLDENS.is_dir():
    GOLDENS = COMMITTED_GOLDENS
MEDIA = Path(os.environ.get("VILA_MEDIA", REPOSITORY.parent / "shared" / "media"))


class GoldenCase:
    """One folder of golden data: an original checkpoint, its conversation and what the original code made of it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.name = folder.name

    @cached_property
    def golden(self) -> dict:
        return json.loads((self.folder / "golden.json").read_text())

    @cached_property
    def tensors(self) -> dict:
        """Tensors by name, those stored once under another name included."""
        stored = load_file(self.folder / "golden.safetensors")
        return {**stored, **{alias: stored[name] for alias, name in self.golden.get("aliases", {}).items()}}

    @cached_property
    def prompt(self) -> dict:
        return json.loads((self.folder / "prompt.json").read_text())

    @property
    def has_checkpoint(self) -> bool:
        return (self.folder / "checkpoint").is_dir()

    @property
    def chats(self) -> list:
        """The conversations, with paths into the case's folder."""
        chats = copy.deepcopy(self.prompt["batch"] if "batch" in self.prompt else [self.prompt["messages"]])
        for chat in chats:
            for message in chat:
                for block in message["content"]:
                    if "path" in block:
                        block["path"] = str(self.folder / block["path"])
        return chats


def golden_cases(family: str = "vila") -> list[GoldenCase]:
    """All cases on disk that hold a conversation."""
    folders = sorted(folder for folder in (GOLDENS / family).iterdir() if (folder / "prompt.json").is_file())
    return [GoldenCase(folder) for folder in folders]


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """`converted(case)`: the case's checkpoint, converted once per session into a folder of its own name."""
    folders: dict[str, Path] = {}

    def convert_once(case: GoldenCase | str) -> Path:
        if isinstance(case, str):
            case = GoldenCase(COMMITTED_GOLDENS / "vila" / case)
        key = str(case.folder)
        if key not in folders:
            target = tmp_path_factory.mktemp("converted") / case.name
            folders[key] = convert(case.folder / "checkpoint", target, conv_mode=case.prompt["conv_mode"])
        return folders[key]

    return convert_once


@pytest.fixture
def lite(converted):
    """Folder of a tiny NVILA-Lite."""
    return converted("nvila_lite_image")


class Loaded(NamedTuple):
    model: VilaForConditionalGeneration
    processor: VilaProcessor


@pytest.fixture(scope="module")
def load(converted):
    """`load(case)`: the model and processor of a converted checkpoint, loaded once for all tests of a file."""

    @cache
    def load_once(case: str) -> Loaded:
        folder = converted(case)
        model = AutoModel.from_pretrained(folder, dtype="float32").eval()
        return Loaded(model, AutoProcessor.from_pretrained(folder))

    return load_once


@pytest.fixture(scope="module")
def qwen(load):
    return load("nvila_lite_image").processor


@pytest.fixture(scope="module")
def llama(load):
    return load("vila15_image").processor


@pytest.fixture(scope="module")
def tiling(load):
    """`tiling(template)`: a processor of small tiles with a tokenizer that knows the template's tokens."""
    return cache(lambda template: tiling_processor(load(TEMPLATES[template]).processor.tokenizer, template))


VILA_HD_CASE = COMMITTED_GOLDENS / "vila_hd" / "vila_hd_vlm"


@pytest.fixture(scope="session")
def vila_hd_folder(tmp_path_factory) -> Path:
    return convert(VILA_HD_CASE / "checkpoint", tmp_path_factory.mktemp("vila_hd") / "tiny-hd")


VILA_U_CASE = GoldenCase(COMMITTED_GOLDENS / "vila_u" / "image_generation")


@pytest.fixture(scope="session")
def vila_u_folder(tmp_path_factory) -> Path:
    return convert(VILA_U_CASE.folder / "checkpoint", tmp_path_factory.mktemp("vila_u") / "tiny_u")


@pytest.fixture(scope="session")
def vila_u_model(vila_u_folder):
    return AutoModel.from_pretrained(vila_u_folder, dtype="float32").eval()


@pytest.fixture(scope="session")
def vila_u_processor(vila_u_folder):
    return AutoProcessor.from_pretrained(vila_u_folder)


@pytest.fixture(scope="session")
def photos() -> list[Path]:
    if not MEDIA.is_dir():
        pytest.skip(f"no photos: {MEDIA} is absent (set $VILA_MEDIA)")
    return sorted(path for path in MEDIA.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".webp"))


class LoopbackServer:
    """A loopback server; `answers` maps paths to `(status, headers, body)`, `content` is any other's body."""

    def __init__(self):
        self.answers, self.requests, self.content = {}, [], b""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append((self.path, dict(self.headers)))
                status, headers, body = outer.answers.get(self.path, (200, {}, outer.content))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.http.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def asked(self):
        return [path for path, _ in self.requests]


@contextmanager
def serving(server):
    """Answers in a thread of its own; `server.http` is the `HTTPServer`."""
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


@pytest.fixture
def loopback():
    with serving(LoopbackServer()) as server:
        yield server


@pytest.fixture(scope="session")
def small_nano(tmp_path_factory) -> Path:
    """Folder of an untrained model of vila-nano's form, but much smaller."""
    import build

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "VISION", {**build.VISION, **sizes})
        patch.setattr(build, "TEXT", {**build.TEXT, **sizes, "num_key_value_heads": 1})
        return build.build(tmp_path_factory.mktemp("nano") / "small")
