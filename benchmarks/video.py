"""Decoding and encoding videos: `python benchmarks/video.py [--plot benchmarks/video.png]`.

- Decoding 64 frames of a 720p clip against one seek per frame, interleaved, frames compared bit by bit.
- `get_video_features` of a random mid-size model in bfloat16: time, and peak memory beyond inputs and features.
- The processor: peak memory per frame beside the bytes of the pixels that it returns.

Every memory figure is that of a process of its own. Prints a table; `--plot` (needs matplotlib) draws it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar
from vila.configuration_vila import VilaConfig
from vila.conversion_vila import convert
from vila.geometry_vila import sample_frames
from vila.modeling_vila import VilaModel
from vila.processing_vila import VilaProcessor
from vila.video_processing_vila import load_frames

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = REPOSITORY / "tests" / "goldens" / "vila" / "nvila_lite_image" / "checkpoint"
MEDIA = Path(os.environ.get("VILA_MEDIA", REPOSITORY.parent / "shared" / "media"))
MIB = 2**20
SIDE = 448


def make_clip(path: Path, frames: int = 217) -> Path:
    """A 720p h264 clip of moving gradients."""
    rows, columns = np.mgrid[0:720, 0:1280]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        for number in range(frames):
            pixels = np.stack([rows + number, columns + 2 * number, rows + columns], axis=-1) % 256
            stream_frame = av.VideoFrame.from_ndarray(pixels.astype(np.uint8), format="rgb24")
            container.mux(stream.encode(stream_frame))
        container.mux(stream.encode())
    return path


def seek_each_frame(path: str, indices: list[int]) -> list:
    """One seek per frame, then decoding up to it."""
    pictures = []
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for index in indices:
            target = round(index / stream.average_rate / stream.time_base)
            container.seek(target, stream=stream)
            pictures.append(next(frame.to_image() for frame in container.decode(stream) if frame.pts >= target))
    return pictures


def measure_decoding(path: str, count: int, repeats: int) -> dict:
    with av.open(path) as container:
        indices = sample_frames(sum(1 for packet in container.demux(video=0) if packet.size), count)
    seconds: dict[str, list[float]] = {"ours": [], "seeks": []}
    for _ in range(repeats):
        start = time.perf_counter()
        ours = list(load_frames(path, count))
        middle = time.perf_counter()
        seeks = seek_each_frame(path, indices)
        seconds["ours"].append(middle - start)
        seconds["seeks"].append(time.perf_counter() - middle)
        if [frame.tobytes() for frame in ours] != [frame.tobytes() for frame in seeks]:
            raise SystemExit("frames differ")
    ratio = statistics.median(slow / fast for slow, fast in zip(seconds["seeks"], seconds["ours"]))
    return {name: statistics.median(values) for name, values in seconds.items()} | {"ratio": ratio}


def resident(name: str) -> float:
    """`VmRSS` or `VmHWM` of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def measured(work) -> tuple[object, float, float]:
    """Result, seconds, and MiB of peak resident memory above that before."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = resident("VmRSS"), time.perf_counter()
    result = work()
    return result, time.perf_counter() - start, resident("VmHWM") - before


@torch.no_grad()
def measure_encoding(frames: int, layers: int) -> dict:
    text = {"model_type": "qwen2", "hidden_size": 1024, "intermediate_size": 2816, "vocab_size": 32000}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 4}  # it does not run here
    vision = {"model_type": "siglip_vision_model", "hidden_size": 576, "intermediate_size": 2304, "image_size": SIDE}
    vision |= {"num_hidden_layers": layers + 1, "num_attention_heads": 8, "patch_size": 14}  # the last is not used
    config = VilaConfig(
        text_config=text, vision_config=vision, projector_type="mlp_downsample_3x3_fix", vision_feature_layer=-2
    )
    torch.manual_seed(0)
    model = VilaModel(config).to(torch.bfloat16).eval()
    pixels = torch.randn(8, 3, SIDE, SIDE, dtype=torch.bfloat16).repeat(frames // 8, 1, 1, 1)
    model.get_video_features(pixels[:8])
    output, seconds, peak = measured(lambda: model.get_video_features(pixels))
    (features,) = output.pooler_output
    return {
        "seconds": seconds,
        "inputs": pixels.nbytes / MIB,
        "features": features.nbytes / MIB,
        "beyond": peak - features.nbytes / MIB,
    }


def measure_processor(frames: int, path: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        processor = VilaProcessor.from_pretrained(convert(TINY, Path(folder) / "converted"))
        processor.image_processor.size = {"height": SIDE, "width": SIDE}
        chat = [{"role": "user", "content": [{"type": "video", "path": path}]}]

        def encode(count: int):
            return processor.apply_chat_template(
                chat, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"num_frames": count}
            )

        encode(8)
        output, seconds, peak = measured(lambda: encode(frames))
    return {"seconds": seconds, "peak": peak, "pixels": output["pixel_values"].nbytes / MIB}


def in_child(name: str, *arguments: object) -> dict:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--child", name, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split("\n")[-2])


def show(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def draw(rows: list[dict], layers: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (memory, seconds) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    frames = [row["frames"] for row in rows]
    for name, label in (("inputs", "pixels given"), ("features", "features returned"), ("beyond", "peak beyond both")):
        memory.plot(frames, [max(row[name], 0.1) for row in rows], "o-", label=label)
    memory.set(title="Memory of get_video_features", xlabel="frames", ylabel="MiB", xscale="log", yscale="log")
    memory.legend()
    seconds.plot(frames, [row["seconds"] for row in rows], "o-", label="measured")
    slope = rows[0]["seconds"] / rows[0]["frames"]
    seconds.plot(frames, [slope * count for count in frames], "--", label=f"linear from {frames[0]} frames")
    seconds.set(title="Time", xlabel="frames", ylabel="seconds", xscale="log", yscale="log")
    seconds.legend()
    for axes in (memory, seconds):
        axes.set_xticks(frames, frames)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.suptitle(f"SigLIP 576 wide, {layers} layers, {SIDE} px, bfloat16, {torch.get_num_threads()} CPU threads")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="interleaved runs of the decoding figure")
    parser.add_argument("--frames", type=int, nargs="*", default=[8, 64, 512, 2048], help="multiples of 8")
    parser.add_argument("--layers", type=int, default=2, help="layers of the tower; the mid-size model has 12")
    parser.add_argument("--clip", help="720p video (default: demo_video.mp4 of $VILA_MEDIA, or one that is made)")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        disable_progress_bar()
        name, count, argument = arguments.child
        work = {"encoding": lambda: measure_encoding(int(count), int(argument))}
        work["processor"] = lambda: measure_processor(int(count), argument)
        return show("\n" + json.dumps(work[name]()))

    with tempfile.TemporaryDirectory() as folder:
        given = arguments.clip or str(MEDIA / "demo_video.mp4")
        clip = given if os.path.isfile(given) else str(make_clip(Path(folder) / "clip.mp4"))
        if arguments.repeats:
            result = measure_decoding(clip, 64, arguments.repeats)
            show(
                f"decode 64 frames: {result['ours']:.2f} s, one seek per frame {result['seeks']:.2f} s, "
                f"{result['ratio']:.1f} x (median of {arguments.repeats}), frames identical"
            )
        for count in (64, 512):
            result = in_child("processor", count, clip)
            peak, pixels = result["peak"] / count, result["pixels"] / count
            show(
                f"process {count} frames: {result['seconds']:.1f} s, peak {peak:.2f} MiB a frame ({pixels:.2f} pixels)"
            )
        show(f"encode with {arguments.layers} tower layers: frames, s, s per frame, MiB pixels, features, beyond both")
        rows = []
        for count in arguments.frames:
            row = in_child("encoding", count, arguments.layers)
            rows.append({"frames": count, **row})
            show(
                f"{count:6d} {row['seconds']:8.1f} {row['seconds'] / count:8.3f} {row['inputs']:8.0f} "
                f"{row['features']:8.0f} {row['beyond']:8.0f}"
            )
        if arguments.plot:
            draw(rows, arguments.layers, arguments.plot)


if __name__ == "__main__":
    main()
