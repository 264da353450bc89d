"""int4 beside bfloat16: decoding, prefill, memory, and what quantising takes: `python benchmarks/quantize.py`.

A VILA with a language model of one of `SHAPES` and random weights. Times are interleaved in one process and medians of
several, memory is that of a process each. Decoding is also a share of the limit: the bytes that a token reads, at the
bandwidth that was measured in the same run (reading on a CPU, copying on a GPU). On a GPU the model is compiled with a
static cache: `--device cuda --shape 8B`.
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

import torch
from timing import generate, resident, seconds_of
from transformers import GenerationConfig
from vila import VilaConfig, VilaForConditionalGeneration, VilaImageProcessor, VilaProcessor
from vila.families_vila import VILA
from vila.int4_linear_vila import Int4Linear
from vila.packed_linear_vila import pack_linears
from vila.quantization_vila import Int8Head, round_head

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "nano"))
from build import build_tokenizer

PROMPT_TOKENS, NEW_TOKENS, GROUP = 512, 24, 128
SHAPES = {
    "tiny": (256, 512, 2, 2, 1, 1024),
    "1.5B": (1536, 8960, 28, 12, 2, 151936),
    "3B": (2048, 11008, 36, 16, 2, 151936),
    "8B": (4096, 14336, 32, 32, 8, 128256),
}  # hidden, feed-forward, layers, heads, key-value heads, vocabulary
TOWER = {
    "model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 56, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
TOWER_PATCHES, TOWER_LAYER = 1024, (1152, 4304)  # SigLIP-so400m at 448 pixels
VARIANTS = ("bfloat16", "int4", "int4, packed head", "int4, int8 head")
CPU_ONLY = ("int4, packed head",)


def config_of(shape: str) -> VilaConfig:
    hidden, ffn, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    text = {
        "model_type": "qwen2", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
        "tie_word_embeddings": shape != "8B",
    }  # fmt: skip
    config = VilaConfig(vision_config=TOWER, text_config=text)
    config.architectures, config.auto_map = ["VilaForConditionalGeneration"], VILA.auto_map
    return config


def save_model(shape: str, folder: Path) -> None:
    """Random weights in bfloat16, and a tokenizer that the calibration needs."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = config_of(shape)
    config.image_token_id = tokenizer.convert_tokens_to_ids(VilaProcessor.image_token)
    config.video_token_id = tokenizer.convert_tokens_to_ids(VilaProcessor.video_token)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = VilaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(previous)
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=1)
    model.save_pretrained(folder)
    image_processor = VilaImageProcessor(image_mode="resize", size={"height": 56, "width": 56})
    processor = VilaProcessor(
        image_processor, tokenizer, chat_template=tokenizer.chat_template, num_tile_tokens=config.num_tile_tokens
    )
    processor.save_pretrained(folder)


def quantize(source: Path, target: Path, *options: str) -> dict[str, float]:
    """Runs the command in a process of its own; seconds and peak memory in MiB."""
    command = [sys.executable, "-m", "vila.quantize", str(source), str(target), "--group-size", str(GROUP), *options]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, resident("VmHWM", process.pid))
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit("quantising failed")
    return {"seconds": time.perf_counter() - start, "peak": peak}


def load(variant: str, folder: Path, device: str = "cpu") -> Any:
    source = folder / ("source" if variant == "bfloat16" else "int4")
    model = VilaForConditionalGeneration.from_pretrained(source, dtype="bfloat16").eval()
    if variant.endswith("int8 head"):
        round_head(model)
    elif variant.endswith("packed head"):
        pack_linears(model)
    return model.to(device)


def bytes_per_token(model: Any) -> float:
    """Weights that a new token reads; one row of the embeddings is nothing."""
    total = 0
    for module in model.model.language_model.modules():
        if isinstance(module, Int4Linear):
            total += module.qweight.nbytes + 2 * module.scales.nbytes  # scales, and zeros in the kernel's form
        elif isinstance(module, torch.nn.Linear):
            total += module.weight.nbytes
    head = model.lm_head
    per_weight = 1 if isinstance(head, Int8Head) else 2
    return total + per_weight * head.in_features * head.out_features


def bandwidth_of(device: str) -> float:
    """Bytes/s: of reading a large array on a CPU, of reading and writing one on a GPU; the best of several."""
    data = torch.ones(2**28, device=device)
    if device == "cpu":
        return max(data.nbytes / seconds_of(data.sum) for _ in range(8))
    other = torch.empty_like(data)
    return max(2 * data.nbytes / seconds_of(finished(lambda: other.copy_(data), device)) for _ in range(8))


def finished(work: Callable[[], Any], device: str) -> Callable[[], Any]:
    """Work that is waited for, where a device only takes orders."""

    def wait() -> None:
        work()
        if device == "cuda":
            torch.cuda.synchronize()

    return wait


def prompt(device: str = "cpu") -> torch.Tensor:
    return torch.arange(4, PROMPT_TOKENS + 4, device=device)[None] % 250 + 4


@torch.inference_mode()
def measure_times(folder: Path, device: str, repeats: int) -> None:
    bandwidth = bandwidth_of(device)
    sys.stdout.write(f"bandwidth {bandwidth / 1e9:.1f} GB/s\n")
    compiled: dict[str, Any] = {"cache_implementation": "static"} if device == "cuda" else {}
    variants = [variant for variant in VARIANTS if device == "cpu" or variant not in CPU_ONLY]
    loaded = {variant: load(variant, folder, device) for variant in variants}
    ids = prompt(device)
    works: dict[str, Callable[[Any], float]] = {
        "decode": lambda model: statistics.median(generate(model, NEW_TOKENS, input_ids=ids, **compiled)),
        "prefill": lambda model: seconds_of(finished(partial(model, ids, logits_to_keep=1), device)),
    }
    for row, work in works.items():
        for model in loaded.values():
            work(model)
        seconds: dict[str, list[float]] = {variant: [] for variant in variants}
        for number in range(repeats):
            for variant in variants[:: 1 if number % 2 == 0 else -1]:
                seconds[variant].append(work(loaded[variant]))
        for variant, model in loaded.items():
            median = statistics.median(seconds[variant])
            ratio = statistics.median(a / b for a, b in zip(seconds["bfloat16"], seconds[variant]))
            share = bytes_per_token(model) / bandwidth / median
            note = f"{share:.2f} of the bandwidth limit, {1 / median:.1f} tokens/s" if row == "decode" else ""
            sys.stdout.write(f"{row:8s} {variant:18s} {median * 1e3:9.1f} ms  {ratio:5.2f} x bfloat16  {note}\n")
            sys.stdout.flush()


@torch.inference_mode()
def measure_tower(repeats: int) -> None:
    """What int8 weights would do for a vision tower: one of its layers on the patches of a picture."""
    hidden = torch.randn(TOWER_PATCHES, TOWER_LAYER[0]).bfloat16()
    weight = torch.randn(TOWER_LAYER[::-1]).bfloat16()
    values, scales = torch.randint(-127, 128, weight.shape, dtype=torch.int8), torch.ones(len(weight)).bfloat16()
    works = {
        "bfloat16": partial(torch.nn.functional.linear, hidden, weight),
        "int8": partial(torch.ops.aten._weight_int8pack_mm, hidden, values, scales),
    }
    ratios = [seconds_of(works["bfloat16"]) / seconds_of(works["int8"]) for _ in range(repeats + 1)][1:]
    sys.stdout.write(f"tower    int8 weights    {statistics.median(ratios):5.2f} x as fast as bfloat16\n")


@torch.inference_mode()
def measure_memory(variant: str, folder: Path) -> None:
    """Peak of loading, a prompt and some tokens, above what the imports take."""
    before = resident("VmRSS")
    model = load(variant, folder)
    generate(model, NEW_TOKENS, input_ids=prompt())
    sys.stdout.write(json.dumps(resident("VmHWM") - before) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.5B")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--search", type=int, metavar="SAMPLES", help="also time the search, on so many samples")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure_memory(options.child[0], Path(options.child[1]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(options.shape, folder / "source")
        cost = quantize(folder / "source", folder / "int4", "--method", "rtn")
        sys.stdout.write(f"round: {cost['seconds']:.0f} s, peak {cost['peak'] / 1024:.2f} GiB\n")
        measure_times(folder, options.device, options.repeats)
        if options.device == "cpu":
            measure_tower(options.repeats)
            peaks = {}
            for variant in VARIANTS:
                command = [sys.executable, __file__, "--child", variant, name]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                peaks[variant] = json.loads(output.splitlines()[-1])
            for variant, peak in peaks.items():
                ratio = peak / peaks["bfloat16"]
                sys.stdout.write(f"memory   {variant:18s} {peak / 1024:9.2f} GiB {ratio:5.2f} x bfloat16\n")
        if options.search:
            cost = quantize(folder / "source", folder / "awq", "--samples", str(options.search))
            sys.stdout.write(f"search: {cost['seconds']:.0f} s, peak {cost['peak'] / 1024:.2f} GiB\n")


if __name__ == "__main__":
    main()
