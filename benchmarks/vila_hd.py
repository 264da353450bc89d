"""Looking closely at pictures of up to 4K: `python benchmarks/vila_hd.py [--plot benchmarks/vila_hd.png]`.

From a picture in memory to the first token of the answer, in bfloat16 with random weights: the encoder has the grids,
budget and proportions of PS3-4K at half its width and a third of its depth. A picture of 378, 756, 1512 or 3780 pixels
goes to an encoder with the scales up to that size, 378 being the low-resolution view alone. Compared are:

- `look`: a fixed budget of 2,560 patches, which the question chooses.
- `all`: every patch of every scale.
- `s2`: dynamic S2 with the same tower, layers and scales, every tile encoded.
- `plain`: `look`, written after the description of the original: both passes from the start, whole pictures cut into
  patches, positions of all of them, and the projector over whole maps. That it sees the same is checked.

FLOP are counted by torch, the limit is theirs at the rate of matrix products of the same run. Each way has a process
of its own, peak memory is that above the loaded model. `all` and `s2` run once.
"""

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timing import Watch, limits, resident, seconds_of
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from vila import VilaConfig, VilaForConditionalGeneration, VilaImageProcessor
from vila.configuration_ps3 import Ps3VisionConfig
from vila.configuration_vila_hd import VilaHDConfig
from vila.encoder_ps3 import LowResView, gather_order, in_order, selection_maps
from vila.looking_vila_hd import LookOptions
from vila.modeling_vila_hd import VilaHDForConditionalGeneration
from vila.prompts_vila_hd import read_rows
from vila.selection_ps3 import at_grids, choose_patches, plan_looks, resize_map

MIB = 2**20
LOW, SIZES, BUDGET = 378, (378, 756, 1512, 3780), 2560
WIDTH, FEED_FORWARD, HEADS = 576, 2152, 8
IMAGE_TOKEN, LOW_TOKENS = 998, 14 * 14
VARIANTS = ("look", "plain", "s2", "all")
TEXT = {
    "model_type": "qwen2", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 1000, "max_position_embeddings": 2**16,
}  # fmt: skip


def cpu_attention_flop(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of an operation that torch's counter does not know, by the shapes."""
    return sdpa_flop_count(query, key, value)


COUNTED: Any = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: cpu_attention_flop}


def scales_of(size: int) -> list[int]:
    return [side for side in SIZES if side <= max(size, SIZES[1])]


def build(variant: str, size: int, layers: int) -> Any:
    common: dict[str, Any] = {
        "hidden_size": WIDTH, "intermediate_size": FEED_FORWARD, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "patch_size": 14,
    }  # fmt: skip
    options: dict[str, Any] = {
        "text_config": TEXT, "projector_type": "mlp_downsample_2x2_fix", "vision_feature_layer": -2,
        "image_token_id": IMAGE_TOKEN, "video_token_id": IMAGE_TOKEN + 1,
    }  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        if variant == "s2":
            tower = {"model_type": "siglip_vision_model", "image_size": LOW, "vision_use_head": False, **common}
            scales = [side for side in SIZES if side <= size]
            options |= {"dynamic_s2": True, "s2_scales": scales, "s2_resize_output_to_scale_idx": -1}
            return VilaForConditionalGeneration(VilaConfig(vision_config=tower, **options)).eval()
        vision = Ps3VisionConfig(
            ps3_scales=scales_of(size), max_select_num=BUDGET, pooling_size=0,
            select_based_on_layer=[round(part * (layers - 1) / 3) for part in range(4)],
            highres_selection_module_hidden_dim=256, highres_selection_module_out_dim=256, **common,
        )  # fmt: skip
        return VilaHDForConditionalGeneration(VilaHDConfig(vision_config=vision, **options)).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def prompt(tokens: int) -> torch.Tensor:
    """Ids of a chat with a picture of so many tokens in front of a question."""
    return torch.cat([torch.arange(20), torch.full((tokens,), IMAGE_TOKEN), torch.arange(40)])[None]


def picture(size: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


def look_budget(variant: str, size: int) -> dict[str, Any]:
    return {"num_token_look_close": 0 if size == LOW else "all" if variant == "all" else BUDGET}


def answer(model: Any, variant: str, size: int, given: Image.Image) -> None:
    """From the picture to the first token."""
    if variant == "s2":
        scales = model.config.s2_scales
        processor = VilaImageProcessor(
            image_mode="dynamic_s2", s2_scales=scales, max_tiles=(size // LOW) ** 2, size={"height": LOW, "width": LOW}
        )
        inputs = processor([given], return_tensors="pt")
        options: dict[str, Any] = {"image_grid_thw": inputs["image_grid_thw"]}
        ids = prompt(LOW_TOKENS * int(inputs["image_grid_thw"].prod()))
    else:
        side = model.config.vision_config.input_size
        inputs = VilaImageProcessor(image_mode="resize", size={"height": side, "width": side})([given])
        options, ids = look_budget(variant, size), prompt(LOW_TOKENS)
    pixels = torch.as_tensor(inputs["pixel_values"]).to(torch.bfloat16)
    if variant == "plain":
        answer_plainly(model, ids, pixels, size)
    else:
        model.generate(
            ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False,
            pad_token_id=0, eos_token_id=[], **options,
        )  # fmt: skip


@torch.no_grad()
def answer_plainly(model: Any, ids: torch.Tensor, pixels: torch.Tensor, size: int) -> None:
    embeds = model.model.embed_text(ids)[0]
    start, end = 20, 20 + LOW_TOKENS
    features = see_plainly(model, ids, pixels, size)
    inputs = torch.cat([embeds[:start], features, embeds[end:]])[None]
    hidden = model.model.language_model(inputs_embeds=inputs, use_cache=True).last_hidden_state
    model.lm_head(hidden[:, -1]).argmax(-1)


@torch.no_grad()
def see_plainly(model: Any, ids: torch.Tensor, pixels: torch.Tensor, size: int) -> torch.Tensor:
    """What the original computes for one picture: `(tokens, hidden_size)`, the low-resolution view first."""
    base, tower = model.model, model.model.vision_tower
    view = tower.see_low_res(pixels)
    tower.score(view)
    low = list(base.project_low_res(view))
    if size == LOW:
        return low[0]
    wanted, _ = base._read_questions(read_rows(ids, None, model.config, 1), low, None)
    view = tower.see_low_res(pixels)  # again, with all of its resizing
    grids = view.pyramid.grids
    tower.score(view)
    probs = at_grids(tower.score(view, wanted), grids)
    budget, counts = model.config.vision_config.look_budget, [rows * columns for rows, columns in grids]
    looks = list(choose_patches(probs, plan_looks(counts, budget, None, BUDGET)))
    tokens = in_order([look_plainly(tower, view, chosen)[-2] for chosen in looks], gather_order(looks, grids))
    maps = selection_maps(looks, probs)
    return torch.cat([base.project_low_res(view)[0], project_plainly(base, tokens[0], [scale[0] for scale in maps])])


def look_plainly(tower: Any, view: LowResView, chosen: list[torch.Tensor]) -> list[torch.Tensor]:
    """A look that cuts whole pictures into patches."""
    config, embed, parts = tower.config, tower.trunk.patch_embed.proj, []
    for number, indices in enumerate(chosen):
        rows, columns = view.pyramid.grids[number]
        size = (rows * config.patch_size, columns * config.patch_size)
        resized = F.interpolate(view.pyramid.pixels.float(), size=size, mode="bicubic").to(view.pyramid.pixels.dtype)
        patches = F.unfold(resized, config.patch_size, stride=config.patch_size).transpose(1, 2)
        positions = tower.trunk.positions(rows, columns) + tower.pos_emb_residual[number][0]
        own = F.linear(patches[0, indices[0]], embed.weight.flatten(1), embed.bias) + positions[indices[0]]
        parts.append(own[None])
    tokens, outputs = torch.cat(parts, 1), []
    for block, seen in zip(tower.trunk.blocks, view.keys_values):
        tokens, _ = block(tokens, seen)
        outputs.append(tokens)
    return outputs


def project_plainly(base: Any, tokens: torch.Tensor, maps: list[torch.Tensor]) -> torch.Tensor:
    """The projector over whole maps, in which zeros stand for what was not seen."""
    kept, start = [], 0
    for chosen in maps:
        whole = tokens.new_zeros(chosen.numel(), tokens.shape[1])
        count = int((chosen > 0).sum())
        whole[chosen.flatten() > 0] = tokens[start : start + count]
        start += count
        cells = base.multi_modal_projector.layers(whole[None])[0]
        is_kept = resize_map(chosen[None], [side // 2 for side in chosen.shape], "area").flatten() == 1
        kept.append(cells[is_kept])
    return torch.cat(kept)


@torch.no_grad()
def check_features() -> None:
    """That the plain passes see the same, or an end."""
    model = build("plain", 1512, 2).float()
    pixels = torch.rand(1, 3, 1512, 1512, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ids = prompt(LOW_TOKENS)
    options = LookOptions(num_token_look_close=BUDGET).completed(model.config)
    ours = model.model.look_closely(ids, None, pixels, options).features[0]
    plain = see_plainly(model, ids, pixels, 1512)
    if ours.shape != plain.shape or not torch.allclose(ours, plain, atol=1e-4):
        raise SystemExit("features differ")


def count_flops(model: Any, work: Callable[[], Any]) -> dict[str, float]:
    """FLOP of all, and of all but the language model."""
    language, starts = [0.0], [0.0]
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:

        def begin(*_: Any) -> None:
            starts[0] = counter.get_total_flops()

        def end(*_: Any) -> None:
            language[0] += counter.get_total_flops() - starts[0]

        parts = (model.model.language_model, model.lm_head)
        handles = [part.register_forward_pre_hook(begin) for part in parts]
        handles += [part.register_forward_hook(end) for part in parts]
        work()
    for handle in handles:
        handle.remove()
    total = counter.get_total_flops()
    return {"flops": total, "encoder_flops": total - language[0]}


def measure(variant: str, size: int, layers: int, repeats: int, rate: float) -> dict[str, Any]:
    model = build(variant, size, layers)
    work = partial(answer, model, variant, size, picture(size))
    result: dict[str, Any] = {}
    if variant in ("all", "s2"):  # long enough to count and to time at once
        before = reset_peak()
        times = [seconds_of(lambda: result.update(count_flops(model, work)))]
    else:
        result.update(count_flops(model, work))
        before = reset_peak()
        times = [seconds_of(work) for _ in range(repeats)]
    seconds = statistics.median(times)
    memory = resident("VmHWM") - before
    return {"seconds": seconds, "limit": result["flops"] / rate, "memory": memory, **result}


def reset_peak() -> float:
    """Resident MiB, from which the peak is counted anew; what sizes before left behind is given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def show(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def draw(rows: dict[str, dict[int, dict[str, float]]], layers: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    labels = {"look": "looking closely", "plain": "plain two passes", "s2": "dynamic S2", "all": "all patches"}
    parts: tuple[tuple[str, str, str, float], ...] = (
        ("seconds", "Time to the first token", "seconds", 1.0),
        ("encoder_flops", "Encoder", "TFLOP", 1e12),
    )
    parts += (("memory", "Peak memory above the model", "MiB", 1.0),)
    for own, (name, title, unit, divisor) in zip(axes, parts):
        for variant, by_size in rows.items():
            values = [row[name] / divisor for row in by_size.values()]
            own.plot(list(by_size), values, "o-", label=labels[variant])
        own.set(title=title, xlabel="pixels per side", ylabel=unit, xscale="log", yscale="log")
        own.set_xticks(SIZES, SIZES)
        own.minorticks_off()
        own.grid(alpha=0.3)
    axes[0].legend()
    threads = torch.get_num_threads()
    figure.suptitle(f"PS3 {WIDTH} wide, {layers} layers, {BUDGET} patches, bfloat16, CPU threads: {threads}")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--sizes", type=int, nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--processor-time", action="store_true", help="not the wall's: where other jobs run")
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        if options.processor_time:
            Watch.count_processor_time()
        rate, _ = limits()
        for size in options.sizes:
            show(json.dumps(measure(options.child, size, options.layers, options.repeats, rate)))
        return
    check_features()
    own = ["--layers", str(options.layers), "--repeats", str(options.repeats)]
    own += ["--processor-time"] if options.processor_time else []
    rows: dict[str, dict[int, dict[str, float]]] = {}
    show(f"{'':6s} {'pixels':>6s} {'s':>8s} {'x limit':>8s} {'encoder TFLOP':>14s} {'all TFLOP':>10s} {'MiB':>7s}")
    for variant in options.variants:
        command = [sys.executable, __file__, "--child", variant, *own, "--sizes", *map(str, options.sizes)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            for size, line in zip(options.sizes, child.stdout or ()):
                row = rows.setdefault(variant, {})[size] = json.loads(line)
                show(
                    f"{variant:6s} {size:6d} {row['seconds']:8.2f} {row['seconds'] / row['limit']:8.2f} "
                    f"{row['encoder_flops'] / 1e12:14.3f} {row['flops'] / 1e12:10.3f} {row['memory']:7.0f}"
                )
                if options.plot:
                    draw(rows, options.layers, options.plot)
        if child.returncode:
            raise SystemExit(f"{variant} failed")


if __name__ == "__main__":
    main()
