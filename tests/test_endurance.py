"""A server's worth of requests in one process: good, broken and interrupted ones leave nothing behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REQUESTS = """
import base64, gc, io, json, os, sys, threading
import av, numpy as np, torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
from transformers.generation.streamers import BaseStreamer
import vila

torch.set_num_threads(1)
model = AutoModel.from_pretrained(sys.argv[1], dtype="float32").eval()
processor = AutoProcessor.from_pretrained(sys.argv[1], media_policy="server")
rounds, warm_up = int(sys.argv[2]), int(sys.argv[3])


def encoded(kind="PNG", size=(180, 120)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def video():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in range(10):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 48), (level * 20, 0, 0)))))
        container.mux(stream.encode())
    return buffer.getvalue()


class Hangup(Exception):
    pass


class Interrupt(BaseStreamer):
    def __init__(self):
        self.tokens = 0

    def put(self, value):
        self.tokens += 1
        if self.tokens == 3:
            raise Hangup

    def end(self):
        pass


png, jpeg, mp4 = encoded(), encoded("JPEG", (90, 200)), video()
text = {"type": "text", "text": "What is this?"}


def chat(*sources, kind="image"):
    return [{"role": "user", "content": [*({"type": kind, kind: source} for source in sources), text]}]


def ask(chats, streamer=None, **options):
    ways = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(chats, **ways, processor_kwargs=options)
    return model.generate(**inputs, max_new_tokens=4, do_sample=False, streamer=streamer)[:, -4:].tolist()


def fails(error, *args, **options):
    try:
        ask(*args, **options)
    except error:
        return
    raise AssertionError("no error")


REQUESTS = [
    lambda: ask([{"role": "user", "content": "Hello!"}]),
    lambda: ask(chat(png)),
    lambda: ask(chat(base64.b64encode(jpeg).decode())),
    lambda: ask([chat(png, jpeg), chat(jpeg)]),
    lambda: ask(chat(mp4, kind="video")),
    lambda: ask(chat(np.zeros((6, 30, 40, 3), np.uint8), kind="video"), num_frames=3),
    lambda: fails(Hangup, chat(png), Interrupt()),
    lambda: fails(Hangup, chat(mp4, kind="video"), Interrupt()),
    lambda: fails(ValueError, chat(png[:500])),
    lambda: fails(ValueError, [chat(png), chat(b"no picture")]),
    lambda: fails(ValueError, chat(mp4[: len(mp4) // 3], kind="video")),
    lambda: fails(ValueError, chat("http://127.0.0.1/a.png")),
    lambda: fails(ValueError, chat("http://127.0.0.1/a.png"), media_policy={"urls": True}),
    lambda: fails(ValueError, chat("/etc/hostname.png")),
    lambda: fails(ValueError, chat(*[png] * 40)),
]


def in_use():
    gc.collect()
    pages = int(open("/proc/self/statm").read().split()[1])
    return {
        "MiB": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }


first = [request() for request in REQUESTS]
samples = []
for number in range(rounds):
    last = [request() for request in REQUESTS]
    if number >= warm_up:
        samples.append(in_use())
json.dump({"samples": samples, "same": first == last}, sys.stdout)
"""

# between the halves of what follows the warm-up: a single picture's pixels forgotten in each round would be 10 MiB
MARGIN_MIB = 1.0
ROUNDS, WARM_UP = 40, 8


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="no /proc here")
def test_hundreds_of_requests_leave_no_memory_files_or_threads_behind(converted):
    command = [sys.executable, "-c", REQUESTS, str(converted("nvila_lite_image")), str(ROUNDS), str(WARM_UP)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    outcome = json.loads(result.stdout)
    assert outcome["same"]  # the last answers are the first ones
    half = len(outcome["samples"]) // 2
    early, late = outcome["samples"][:half], outcome["samples"][half:]
    assert min(s["MiB"] for s in late) - min(s["MiB"] for s in early) < MARGIN_MIB, outcome["samples"]
    for what in ("files", "threads"):
        assert late[-1][what] <= early[0][what], outcome["samples"]
