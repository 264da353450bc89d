"""Encode, prefill, decode, memory, load and preprocessing beside transformers: `python benchmarks/understanding.py`.

The peer is transformers' `llava_onevision` with the same tower, projector, language model and number of tokens, both
with random weights in bfloat16; that of preprocessing is Pillow and numpy, tile after tile. Times are interleaved in
one process, memory and loading are those of a process each. Every time is also a multiple of the limit that was
measured in the same run: matrix products for encoding and prefill, reading the weights for decoding.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timing import generate, interleaved, limits, resident, seconds_of
from transformers import AutoConfig, AutoModel, LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
from vila.configuration_vila import VilaConfig
from vila.geometry_vila import TileGrid, tile_boxes
from vila.image_processing_vila import VilaImageProcessor
from vila.modeling_vila import VilaForConditionalGeneration
from vila.packed_linear_vila import pack_linears
from vila.vision_vila import VilaMultiModalProjector

MIB = 2**20
SIDE, PATCHES, WIDTH, FEED_FORWARD = 448, 1024, 576, 2304  # of the tower: pixels, patches and channels of a tile
TILES, PROMPT_TOKENS, NEW_TOKENS = 10, 1282, 32
PHOTO_SIZE = (1450, 1468)
IMAGE_TOKEN, VIDEO_TOKEN = 31998, 31999
TEXT = {
    "model_type": "qwen2", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12,
    "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
ROWS = {
    "preprocess": 0.6, "encode": 0.95, "prefill": 1.02, "decode": 0.85, "decode, packed": 0.85,
    "generate memory": 0.9, "generate memory, packed": 0.9, "load": 1.0, "load memory": 1.0,
}  # fmt: skip


def tower(layers: int) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model", "hidden_size": WIDTH, "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": layers, "num_attention_heads": 8, "image_size": SIDE, "patch_size": 14,
        "vision_use_head": False,
    }  # fmt: skip


def our_config(layers: int) -> VilaConfig:
    return VilaConfig(
        vision_config=tower(layers), text_config=TEXT, projector_type="mlp_downsample_3x3_fix",
        vision_feature_layer=-2, image_token_id=IMAGE_TOKEN, video_token_id=VIDEO_TOKEN,
    )  # fmt: skip


class Peer(LlavaOnevisionForConditionalGeneration):
    """`llava_onevision` with the projector that merges 3 x 3 patches, for equal numbers of tokens."""

    def __init__(self, config: LlavaOnevisionConfig):
        super().__init__(config)
        self.model.multi_modal_projector = VilaMultiModalProjector(our_config(config.vision_config.num_hidden_layers))


def peer_config(layers: int) -> LlavaOnevisionConfig:
    return LlavaOnevisionConfig(
        vision_config=tower(layers), text_config=TEXT, vision_feature_layer=-2, vision_feature_select_strategy="full",
        image_token_id=IMAGE_TOKEN, video_token_id=VIDEO_TOKEN, image_grid_pinpoints=[[SIDE, SIDE]],
    )  # fmt: skip


def save_models(folder: Path, layers: int) -> None:
    torch.manual_seed(0)
    VilaForConditionalGeneration(our_config(layers)).to(torch.bfloat16).save_pretrained(folder / "ours")
    Peer(peer_config(layers)).to(torch.bfloat16).save_pretrained(folder / "peer")


def load(name: str, folder: Path) -> Any:
    model_class: Any = VilaForConditionalGeneration if name == "ours" else Peer
    return model_class.from_pretrained(folder / name, dtype="bfloat16").eval()


def media(name: str) -> dict[str, torch.Tensor]:
    """Ten tiles: of one photo for us, as ten pictures (which it does not tile again) for the peer."""
    pixels = torch.randn(TILES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    if name == "ours":
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 3, 3]])}
    sizes = torch.tensor([[SIDE, SIDE]] * TILES)
    return {"pixel_values": pixels[:, None], "image_sizes": sizes, "batch_num_images": torch.tensor([TILES])}


def prompt(name: str, has_media: bool) -> torch.Tensor:
    """`(1, PROMPT_TOKENS)` ids; the peer spends one more on every picture, a line break."""
    ids = torch.arange(PROMPT_TOKENS)[None] % 30000
    if has_media:
        ids[:, : TILES * (121 if name == "ours" else 122)] = IMAGE_TOKEN
    return ids


def encode_flops(layers: int) -> float:
    """Of the tower layers that the features need, and of the projector."""
    layer = 2 * PATCHES * (4 * WIDTH**2 + 2 * WIDTH * FEED_FORWARD) + 4 * PATCHES**2 * WIDTH
    projector = 2 * 121 * (9 * WIDTH * 3 * WIDTH + 3 * WIDTH * 1024 + 1024**2)
    return TILES * ((layers - 1) * layer + 2 * PATCHES * WIDTH * 3 * 14**2 + projector)


def prefill_flops() -> float:
    hidden, layers = TEXT["hidden_size"], TEXT["num_hidden_layers"]
    return 2 * layer_weights() * PROMPT_TOKENS + 2 * PROMPT_TOKENS**2 * hidden * layers


def layer_weights() -> int:
    hidden, ffn = TEXT["hidden_size"], TEXT["intermediate_size"]
    kv = hidden * TEXT["num_key_value_heads"] // TEXT["num_attention_heads"]
    return TEXT["num_hidden_layers"] * (2 * hidden**2 + 2 * hidden * kv + 3 * hidden * ffn)


def decode_bytes() -> float:
    head, kv = TEXT["hidden_size"] * TEXT["vocab_size"], 2 * 4 * 64 * TEXT["num_hidden_layers"] * PROMPT_TOKENS
    return 2 * (layer_weights() + head + kv)


def show_times(row: str, seconds: dict[str, list[float]], limit: float) -> None:
    ours, other = seconds["ours"], seconds["peer"]
    ratio = statistics.median(a / b for a, b in zip(ours, other))
    mine, theirs = statistics.median(ours), statistics.median(other)
    show(row, mine * 1e3, theirs * 1e3, "ms", ratio, f"{mine / limit:9.2f} {theirs / limit:9.2f}" if limit else "")


def show(row: str, ours: float, peer: float, unit: str, ratio: float, note: str = "") -> None:
    goal = f"<= {ROWS[row]:.2f}" if row in ROWS else ""
    sys.stdout.write(f"{row:24s} {ours:10.1f} {peer:10.1f} {unit:4s} {ratio:7.2f} {goal:8s} {note}\n")
    sys.stdout.flush()


@torch.inference_mode()
def measure_times(repeats: int, tower_layers: int) -> None:
    flops, bandwidth = limits()
    sys.stdout.write(f"limits: {flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s\n")
    sys.stdout.write(
        f"{'':24s} {'ours':>10s} {'peer':>10s} {'':4s} {'ratio':>7s} {'goal':8s} {'x limit: ours, peer'}\n"
    )
    show_times("preprocess", interleaved(preprocessing(), repeats), 0)
    with tempfile.TemporaryDirectory() as folder:
        save_models(Path(folder), tower_layers)
        models = {name: load(name, Path(folder)) for name in ("ours", "peer")}

        def encode(name: str) -> float:
            return seconds_of(partial(models[name].get_image_features, **media(name)))

        def prefill(name: str) -> float:
            return seconds_of(partial(models[name], prompt("ours", False), logits_to_keep=1))

        def decode(name: str) -> float:
            return statistics.median(generate(models[name], NEW_TOKENS, input_ids=prompt("ours", False)))

        limit = {encode: encode_flops(tower_layers) / flops, prefill: prefill_flops() / flops}
        limit[decode] = decode_bytes() / bandwidth
        for work in (encode, prefill, decode):
            seconds = interleaved({name: partial(work, name) for name in models}, repeats)
            show_times(work.__name__, seconds, limit[work])
        pack_linears(models["ours"])
        seconds = interleaved({name: partial(decode, name) for name in models}, repeats)
        show_times("decode, packed", seconds, limit[decode])


def preprocessing() -> dict[str, Callable[[], float]]:
    """A photo of ten tiles, by the image processor and by Pillow and numpy, tile after tile; the same to the bit."""
    noise = np.random.default_rng(0).integers(0, 256, (*PHOTO_SIZE[::-1], 3), dtype=np.uint8)
    photo, mean, std = Image.fromarray(noise), np.float32([0.5] * 3), np.float32([0.5] * 3)
    processor = VilaImageProcessor(image_mode="dynamic", max_tiles=9, size={"height": SIDE, "width": SIDE})

    def plain() -> np.ndarray:
        resized = photo.resize((3 * SIDE, 3 * SIDE), Image.Resampling.BICUBIC)
        tiles = [resized.crop(box) for box in tile_boxes(TileGrid(3, 3), SIDE)]
        tiles.append(photo.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        scaled = [(np.asarray(tile) * (1 / 255)).astype(np.float32) for tile in tiles]
        return np.stack([((tile - mean) / std).transpose(2, 0, 1) for tile in scaled])

    if not np.array_equal(processor([photo])["pixel_values"], plain()):
        raise SystemExit("pixels differ")
    return {"ours": lambda: seconds_of(lambda: processor([photo])), "peer": lambda: seconds_of(plain)}


def measure_memory(name: str, folder: Path, is_packed: bool) -> dict[str, float]:
    """Loading, then `generate()` with pictures; MiB above what the imports take."""
    # what the first load imports
    AutoModel.from_config(our_config(1).vision_config), AutoModel.from_config(AutoConfig.for_model(**TEXT | TINY))
    before = resident("VmRSS")
    reset_peak()
    start = time.perf_counter()
    model = load(name, folder)
    figures = {"load": (time.perf_counter() - start) * 1e3, "load memory": resident("VmHWM") - before}
    if is_packed:
        pack_linears(model)
        figures["packing memory"] = resident("VmHWM") - before
        reset_peak()
    for _ in range(2):  # the second finds all weights in memory
        generate(model, 4, input_ids=prompt(name, True), **media(name))
    return {**figures, "generate memory": resident("VmHWM") - before}


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure_children(repeats: int, tower_layers: int) -> None:
    runs: dict[tuple[str, str], list[dict[str, float]]] = {("ours", ""): [], ("ours", "packed"): [], ("peer", ""): []}
    with tempfile.TemporaryDirectory() as folder:
        save_models(Path(folder), tower_layers)
        weights = (Path(folder) / "ours" / "model.safetensors").stat().st_size / MIB
        for _ in range(repeats):
            for (name, packed), results in runs.items():
                command = [sys.executable, __file__, "--child", name, folder, packed]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                results.append(json.loads(output.splitlines()[-1]))
    peer = runs["peer", ""]
    for row, packed in (("load", ""), ("load memory", ""), ("generate memory", ""), ("generate memory", "packed")):
        pairs = [(result[row], other[row]) for result, other in zip(runs["ours", packed], peer)]
        mine, theirs = (statistics.median(column) for column in zip(*pairs))
        unit = "ms" if row == "load" else "MiB"
        note = "" if row == "load" else f"{mine / weights:.2f} {theirs / weights:.2f} x weights"
        title = f"{row}, {packed}".removesuffix(", ")
        show(title, mine, theirs, unit, statistics.median(a / b for a, b in pairs), note)
    peak = statistics.median(result["packing memory"] for result in runs["ours", "packed"])
    sys.stdout.write(f"packing: peak of {peak:.0f} MiB, the mapped file included\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tower-layers", type=int, default=27)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, folder, packed = arguments.child
        sys.stdout.write("\n" + json.dumps(measure_memory(name, Path(folder), packed == "packed")) + "\n")
        return
    measure_times(arguments.repeats, arguments.tower_layers)
    measure_children(arguments.repeats, 12)


if __name__ == "__main__":
    main()
