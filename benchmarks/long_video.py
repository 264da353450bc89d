"""Long videos and long chats on one device: `python benchmarks/long_video.py [--plot benchmarks/long_video.png]`.

- A video goes from its file to the first token, streamed and in chunks: seconds of decoding, encoding and prefilling,
  and the peak of resident memory, each number of frames in a process of its own; growth against linear, and against
  what `vila-memory` computes. The same at once, for the smaller numbers.
- A text that fills a context of so many tokens (`--context 1048576`), through one layer of one narrow head: seconds,
  and the peak against what `vila-memory` computes.
- Time to the first token of a chat's next turn, with a history in the cache, against a bare forward of the same tokens
  on an equally long ready cache, and against prefilling all again. Interleaved; ratios are medians of pairs.

`--processor-time` counts what this process computed instead of what the clock says: for a core that others use, too.

Random weights in bfloat16: 112-pixel frames of 16 tokens, SigLIP 192 wide, Qwen2 256 wide for videos; Qwen2 1024 wide
with 12 layers for chats.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from timing import resident
from transformers import DynamicCache
from transformers.utils.logging import disable_progress_bar
from vila.configuration_vila import VilaConfig
from vila.conversion_vila import convert
from vila.frame_stream_vila import FrameStream
from vila.memory_vila import MemoryPlan, loaded_bytes
from vila.modeling_vila import VilaForConditionalGeneration
from vila.processing_vila import VilaProcessor

TINY = Path(__file__).resolve().parents[1] / "tests" / "goldens" / "vila" / "nvila_lite_image" / "checkpoint"
MIB = 2**20
SIDE = 112
NEW_TOKENS = 32
clock = time.perf_counter
PASSED_ON: list[str] = []


def seconds_of(work: Any) -> float:
    start = clock()
    work()
    return clock() - start


def make_clip(path: Path, frames: int) -> Path:
    """A small h264 clip of moving gradients."""
    rows, columns = np.mgrid[0:128, 0:160]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 160, 128, "yuv420p"
        for number in range(frames):
            pixels = np.stack([rows + number, columns + 2 * number, rows + columns], axis=-1) % 256
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return path


def load_processor() -> VilaProcessor:
    with tempfile.TemporaryDirectory() as folder:
        processor = VilaProcessor.from_pretrained(convert(TINY, Path(folder) / "converted"))
    processor.image_processor.size = {"height": SIDE, "width": SIDE}
    processor.num_tile_tokens, processor.video_as_images = 16, True
    return processor


def make_model(processor: VilaProcessor, hidden: int, layers: int, **changes: Any) -> VilaForConditionalGeneration:
    """`changes` of the language model's config."""
    text = {"model_type": "qwen2", "hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "vocab_size": 32000}
    text |= {"num_attention_heads": hidden // 64, "num_key_value_heads": max(2, hidden // 256)}
    text |= {"num_hidden_layers": layers, "max_position_embeddings": 2**20}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 3_580_165_449.0}}
    text |= changes
    vision = {"model_type": "siglip_vision_model", "hidden_size": 192, "intermediate_size": 768, "image_size": SIDE}
    vision |= {"num_hidden_layers": 5, "num_attention_heads": 3, "patch_size": 14, "vision_use_head": False}
    ids = {"image_token_id": processor.image_token_id, "video_token_id": processor.video_token_id}
    torch.manual_seed(0)
    config = VilaConfig(text_config=text, vision_config=vision, projector_type="mlp_downsample_2x2_fix", **ids)
    return VilaForConditionalGeneration(config).to(torch.bfloat16).eval()


class Timer:
    """Adds up the seconds inside of functions and generators."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += clock() - start

        return timed

    def around_steps(self, generator: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            step = self.around(lambda items: next(items, None))
            items = generator(*args, **kwargs)
            while (item := step(items)) is not None:
                yield item

        return timed


def measure_video(path: str, frames: int, at_once: bool) -> dict[str, float]:
    """One video to the first token."""
    processor = load_processor()
    model = make_model(processor, 256, 6)
    options = {} if at_once else {"prefill_chunk_size": 2048}

    def inputs(count: int) -> Any:
        return processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [{"type": "video", "path": path}, {"type": "text", "text": "What happens?"}],
                }
            ],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"num_frames": count, "stream_frames": not at_once},
        )

    model.generate(**inputs(8), max_new_tokens=1)
    decoding, encoding = Timer(), Timer()
    if at_once:
        processor._process_media = decoding.around(processor._process_media)  # type: ignore[method-assign]
    FrameStream.read = decoding.around_steps(FrameStream.read)  # type: ignore[method-assign]
    model.model.get_image_features = encoding.around(model.model.get_image_features)  # type: ignore[method-assign]
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = resident("VmRSS"), clock()
    asked = inputs(frames)
    model.generate(**asked, **options, max_new_tokens=1)
    seconds, peak = clock() - start, resident("VmHWM") - before
    tokens = asked["input_ids"].shape[1]
    plan = MemoryPlan(model.config, loaded_bytes(model), attention="sdpa_cpu")
    return {
        "tokens": tokens,
        "decode": decoding.seconds,
        "encode": encoding.seconds,
        "prefill": seconds - decoding.seconds - encoding.seconds,
        "seconds": seconds,
        "peak": peak,
        "planned": (plan.cache_bytes(tokens) + plan.chunk_bytes(tokens)) / MIB,
        "cache": plan.cache_bytes(tokens) / MIB,
    }


def measure_context(tokens: int) -> dict[str, float]:
    """A text of so many tokens less one, and the token that fills the context."""
    narrow = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": tokens}
    model = make_model(load_processor(), 64, 1, **narrow)
    # below the placeholders of pictures and videos
    ids = torch.randint(5, min(model.config.image_token_id, model.config.video_token_id), (1, tokens - 1))
    model.generate(input_ids=ids[:, :5000], prefill_chunk_size=2048, max_new_tokens=1, min_new_tokens=1)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = resident("VmRSS"), clock()
    written = model.generate(input_ids=ids, max_new_tokens=1, min_new_tokens=1)
    seconds, peak = clock() - start, resident("VmHWM") - before
    plan = MemoryPlan(model.config, loaded_bytes(model), attention="sdpa_cpu")
    cache, chunk = plan.cache_bytes(tokens), plan.chunk_bytes(tokens)
    return {
        "tokens": written.shape[1],
        "seconds": seconds,
        "peak": peak,
        "cache": cache / MIB,
        "planned": (cache + chunk) / MIB,
    }


@torch.no_grad()
def measure_history(history: int, repeats: int) -> dict[str, float]:
    """The first token of a turn of `NEW_TOKENS` tokens behind a history."""
    model = make_model(load_processor(), 1024, 12)
    ids = torch.randint(0, 300, (1, history + NEW_TOKENS))
    new, mask = ids[:, history:], torch.ones_like(ids)
    cache = DynamicCache(config=model.config.text_config)
    model.generate(input_ids=ids[:, : max(history, 1)], past_key_values=cache, max_new_tokens=1)
    if not history:
        cache.reset()

    def generate() -> None:
        model.generate(input_ids=new, attention_mask=mask, past_key_values=cache, max_new_tokens=1, do_sample=False)

    def bare() -> None:
        hidden = model.model.language_model(input_ids=new, past_key_values=cache).last_hidden_state
        model.lm_head(hidden[:, -1:]).argmax(-1)

    def again() -> None:
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=1, do_sample=False)

    def seconds(work: Any) -> float:
        taken = seconds_of(work)
        cache.crop(-NEW_TOKENS) if history else cache.reset()
        return taken

    for work in (generate, bare):
        seconds(work)
    pairs = [(seconds(generate), seconds(bare)) for _ in range(repeats)]
    result = {
        "generate": statistics.median(first for first, _ in pairs),
        "bare": statistics.median(second for _, second in pairs),
        "ratio": statistics.median(first / second for first, second in pairs),
    }
    anew = [seconds_of(again) for _ in range(1 if history > 4096 else 2)]
    return {**result, "again": statistics.median(anew), "gain": statistics.median(anew) / result["generate"]}


def in_child(name: str, *arguments: object) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, *PASSED_ON, "--child", name, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split("\n")[-2])


def show(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def draw(rows: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (memory, seconds) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    frames = [row["frames"] for row in rows]
    for name, label in (("peak", "measured peak"), ("planned", "computed: cache + chunk"), ("cache", "cache")):
        memory.plot(frames, [row[name] for row in rows], "o-", label=label)
    memory.set(title="Memory beyond weights", xlabel="frames", ylabel="MiB", xscale="log", yscale="log")
    for name in ("decode", "encode", "prefill"):
        seconds.plot(frames, [row[name] for row in rows], "o-", label=name)
    slope = rows[0]["seconds"] / rows[0]["frames"]
    seconds.plot(frames, [slope * count for count in frames], "--", label=f"all, linear from {frames[0]} frames")
    seconds.set(title="Time", xlabel="frames", ylabel="seconds", xscale="log", yscale="log")
    for axes in (memory, seconds):
        axes.set_xticks(frames, frames)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"A video from its file to the first token, {torch.get_num_threads()} CPU thread(s)")
    figure.savefig(path, dpi=110)


def measure_videos(counts: list[int]) -> list[dict[str, float]]:
    show("frames, tokens, s decode, encode, prefill, x linear in all; MiB peak, cache, computed; at once: s, MiB")
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        clip = make_clip(Path(folder) / "clip.mp4", max(counts))
        for count in counts:
            row = {"frames": count, **in_child("video", clip, count, 0)}
            rows.append(row)
            linear = row["seconds"] / rows[0]["seconds"] / (count / counts[0])
            once = in_child("video", clip, count, 1) if count <= 256 else None
            beside = f"{once['seconds']:8.1f} {once['peak']:7.0f}" if once else ""
            show(
                f"{count:6d} {row['tokens']:7.0f} {row['decode']:7.1f} {row['encode']:7.1f} {row['prefill']:7.1f} "
                f"{linear:6.2f} {row['peak']:8.0f} {row['cache']:7.0f} {row['planned']:7.0f} {beside}"
            )
    return rows


def main() -> None:
    global clock
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--frames", type=int, nargs="*", default=[64, 256, 1024, 2048], help="ascending")
    parser.add_argument("--context", type=int, nargs="*", default=[131072], help="tokens of a text that fills it")
    parser.add_argument("--history", type=int, nargs="*", default=[0, 1024, 4096, 16384], help="tokens")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of a history")
    parser.add_argument("--processor-time", action="store_true", help="seconds of this process, not of the clock")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.processor_time:
        clock = time.process_time
        PASSED_ON.append("--processor-time")
    if arguments.child:
        disable_progress_bar()
        name, *values = arguments.child
        if name == "video":
            result = measure_video(values[0], int(values[1]), values[2] == "1")
        elif name == "context":
            result = measure_context(int(values[0]))
        else:
            result = measure_history(int(values[0]), int(values[1]))
        return show("\n" + json.dumps(result))
    rows = measure_videos(arguments.frames) if arguments.frames else []
    if arguments.plot:
        draw(rows, arguments.plot)
    for tokens in arguments.context:
        row = in_child("context", tokens)
        show(
            f"a context of {tokens:,} tokens filled in {row['seconds']:.0f} s: peak {row['peak']:.0f} MiB, "
            f"of which cache {row['cache']:.0f}; computed {row['planned']:.0f}"
        )
    if arguments.history:
        show(f"{NEW_TOKENS} new tokens behind a history: tokens, ms, ms bare forward, ratio, ms all again, x faster")
    for history in arguments.history:
        row = in_child("history", history, arguments.repeats)
        show(
            f"{history:6d} {row['generate'] * 1e3:8.1f} {row['bare'] * 1e3:8.1f} {row['ratio']:6.2f} "
            f"{row['again'] * 1e3:10.1f} {row['gain']:6.1f}"
        )


if __name__ == "__main__":
    main()
