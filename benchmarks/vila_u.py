"""Drawing with VILA-U, beside its limit and beside the loop of the original: `python benchmarks/vila_u.py`.

Random weights in bfloat16, in the ratios of the 7B release: of all that a position reads, depth transformer, language
model and head have the same shares (the pixel decoder, which cannot be that narrow, has more). A picture has 6 x 6
positions instead of 16 x 16, and the prompt is shorter likewise.

- Every part's time beside its limit: the larger of its bytes at the bandwidth and its FLOP at the rate of matrix
  products, both measured in the same run; and all beside the rate at which torch's own kernel multiplies so few rows.
- The plain loop is written after the description of the original: every sample prefilled with both of its prompts, no
  cache in the depth transformer, a word sampled at each position, the embedding made twice, both halves decoded. That
  both draw the same codes is checked first, in float32.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from timing import Watch, interleaved, limits, seconds_of, wait
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache
from vila import VilaUConfig, VilaUForConditionalGeneration
from vila.generation_vila_u import join_left_padded
from vila.packed_linear_vila import PackedLinear, pack_linears
from vila.sampling_vila_u import Sampling, code_filters

# hidden, feed-forward, layers, heads, vocabulary; channels and codes; depth width, heads; decoder channels; side
SHAPES = {
    "tiny": (64, 128, 2, 2, 64, 64, 64, 64, 2, 32, 64),
    "scaled": (1024, 2752, 12, 8, 3072, 256, 4096, 384, 6, 32, 96),
    "7b": (4096, 11008, 32, 32, 32004, 1024, 16384, 2560, 40, 128, 256),
}
PROMPT_TOKENS, NEGATIVE_TOKENS, SCALE = 24, 18, 3.0
BYTES = 2
LINEARS = (torch.nn.Linear, PackedLinear)
STREAMED = ("language_model", "depth_transformer", "multi_modal_projector")


def build(shape: str, dtype: torch.dtype, device: str) -> Any:
    hidden, ffn, layers, heads, vocabulary, channels, codes, width, depth_heads, decoder, side = SHAPES[shape]
    text = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {  # no picture is encoded here
        "model_type": "siglip_vision_model", "hidden_size": channels, "intermediate_size": channels,
        "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": side, "patch_size": 16,
        "vision_use_head": False,
    }  # fmt: skip
    config = VilaUConfig(
        text_config=text, vision_config=vision, codebook_size=codes, depth_hidden_size=width,
        depth_num_heads=depth_heads, decoder_channels=decoder, decoder_latent_channels=2 * decoder,
        decoder_resolution=side, decoder_attention_resolutions=[side // 16], image_start_token_id=1,
        video_start_token_id=2, image_token_id=vocabulary - 2, video_token_id=vocabulary - 1,
    )  # fmt: skip
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return VilaUForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(previous)


def prompts(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of a prompt and of its negative, `(1, length)`."""
    ids = torch.arange(PROMPT_TOKENS, device=device)[None] % 40 + 3
    ids[:, -1] = 1
    return ids, ids[:, -NEGATIVE_TOKENS:]


def draw(model: Any, samples: int, **options: Any) -> Any:
    ids, negative = prompts(str(model.device))
    return model.generate(
        input_ids=ids, negative_prompt_ids=negative, generation_mode="image", guidance_scale=SCALE,
        num_return_sequences=samples, **options,
    )  # fmt: skip


@torch.no_grad()
def draw_plainly(model: Any, samples: int, sampling: Sampling) -> torch.Tensor:
    """The original's loop; codes of both halves, `(2 samples, positions, depth)`."""
    base, cache = model.model, DynamicCache(config=model.config.text_config)
    rows = [(base.embed_text(ids).repeat(samples, 1, 1), ids.repeat(samples, 1) * 0 + 1) for ids in prompts("cpu")]
    inputs, mask = join_left_padded(rows)
    drawn = []
    for _ in range(model.config.num_tile_tokens):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
        hidden = base.language_model(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        codes = torch.zeros(2 * samples, model.config.code_depth, dtype=torch.long)
        for depth in range(model.config.code_depth):
            embeddings = base.quantizer.embed(codes)
            logits = base.depth_transformer(hidden, embeddings[:, : depth + 1])[:, -1].float()
            prompted, negative = logits.chunk(2)
            codes[:, depth] = sampling.choose(negative + SCALE * (prompted - negative)).repeat(2)
        features = base.quantizer.embed(codes).sum(-2, keepdim=True)
        words = model.lm_head(base.multi_modal_projector(features)).float().softmax(-1)
        torch.multinomial(words[:, 0], 1)
        inputs = base.multi_modal_projector(features)
        mask = torch.cat([mask, mask[:, -1:]], dim=1)
        drawn.append(codes)
    codes = torch.stack(drawn, dim=1)
    base.decode_features(base.quantizer.embed(codes).sum(-2))
    return codes


def check_codes() -> None:
    """That both loops draw the same, or an end."""
    model = build("tiny", torch.float32, "cpu")
    ours = draw(model, 2, do_sample=False).sequences
    plain = draw_plainly(model, 2, Sampling(code_filters(model.config.codebook_size), do_sample=False))
    if not torch.equal(ours, plain[:2]):
        raise SystemExit("codes differ")


class Parts:
    """Seconds that each part of a drawing takes; the first call of the language model is the prompt's."""

    def __init__(self, device: str):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def watched(self, base: Any) -> Any:
        """While it lasts, calls of the parts are timed."""
        names = ("language_model", "depth_transformer", "multi_modal_projector", "pixel_decoder")
        originals = [(owner, name, getattr(owner, name)) for owner, name in [(Sampling, "choose")]]
        handles: list[Any] = []
        starts: list[float] = []

        def begin(*_: Any, **__: Any) -> None:
            wait(self.device)
            starts.append(Watch.read())

        def end(name: str, *_: Any) -> None:
            wait(self.device)
            is_prompt = name == "language_model" and "prompt" not in self.seconds
            self.seconds["prompt" if is_prompt else name] += Watch.read() - starts.pop()

        def choose(sampling: Sampling, logits: torch.Tensor) -> torch.Tensor:
            begin()
            codes = originals[0][2](sampling, logits)
            end("sampling")
            return codes

        for name in names:
            module = getattr(base, name)
            handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(partial(end, name))]
        Sampling.choose = choose  # type: ignore[method-assign]
        try:
            yield
        finally:
            Sampling.choose = originals[0][2]  # type: ignore[method-assign]
            for handle in handles:
                handle.remove()


def weights_of(*modules: Any) -> int:
    """Of the linear layers, which are what every token goes through."""
    linears = [part for module in modules for part in module.modules() if isinstance(part, LINEARS)]
    return sum(linear.in_features * linear.out_features for linear in linears)


def streamed_bytes(model: Any) -> int:
    """Of weights that are read for all positions, once for each of its steps."""
    base, tokens, depth = model.model, model.config.num_tile_tokens, model.config.code_depth
    transformer = base.depth_transformer
    once = (tokens - 1) * weights_of(base.language_model, base.multi_modal_projector)
    every = depth * weights_of(transformer.layers, transformer.head) + weights_of(transformer.hidden_projection)
    return BYTES * (once + tokens * (every + (depth - 1) * weights_of(transformer.code_projection)))


def kernel_rate(model: Any, rows: int) -> float:
    """Weight bytes/s of the language model's linear layers alone, one after the other, on that many rows."""
    parts = [part for part in model.model.language_model.modules() if isinstance(part, LINEARS)]
    inputs = {part.in_features: torch.randn(rows, part.in_features).to(model.device, model.dtype) for part in parts}
    size = BYTES * sum(part.in_features * part.out_features for part in parts)

    @torch.inference_mode()
    def multiply() -> None:
        for part in parts:
            part(inputs[part.in_features])
        wait(model.device.type)

    return size / min(seconds_of(multiply) for _ in range(8))


def decoder_flops(model: Any) -> float:
    codes = torch.zeros(1, model.config.num_tile_tokens, model.config.code_depth, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model.decode_codes(codes.to(model.device))
    return counter.get_total_flops()


def part_limits(model: Any, samples: int, flops: float, bandwidth: float) -> dict[str, float]:
    """Seconds that each part takes at best."""
    base, text, tokens = model.model, model.config.text_config, model.config.num_tile_tokens
    rows, depth = 2 * samples, model.config.code_depth

    def seconds(weights: float, through: float, further_bytes: float = 0.0) -> float:
        return max((BYTES * weights + further_bytes) / bandwidth, 2 * weights * through / flops)

    language = weights_of(base.language_model)
    # of the tokens that lie before each position, on the mean
    cached = rows * (PROMPT_TOKENS + tokens / 2) * 2 * text.num_hidden_layers * text.hidden_size * BYTES
    transformer, first = base.depth_transformer, weights_of(base.depth_transformer.hidden_projection)
    every = weights_of(transformer.layers, transformer.head)
    codes = weights_of(transformer.code_projection)
    return {
        "prompt": seconds(language, PROMPT_TOKENS + NEGATIVE_TOKENS),
        "language_model": (tokens - 1) * seconds(language, rows, cached),
        "depth_transformer": tokens * (seconds(first, rows) + depth * seconds(every, rows))
        + tokens * (depth - 1) * seconds(codes, rows),
        "multi_modal_projector": (tokens - 1) * seconds(weights_of(base.multi_modal_projector), rows),
        "pixel_decoder": samples * decoder_flops(model) / flops,
    }


def timed(parts: list[Parts], model: Any, device: str, samples: int) -> float:
    own = Parts(device)
    with own.watched(model.model):
        seconds = seconds_of(lambda: draw(model, samples))
    own.seconds["rest"] = seconds - sum(own.seconds.values())
    parts.append(own)
    return seconds


def measure(
    model: Any, device: str, samples: int, repeats: int, best: dict[str, float], plain: bool, title: str
) -> None:
    sampling = Sampling(code_filters(model.config.codebook_size, 1.0, min(900, model.config.codebook_size), 0.96))
    parts: list[Parts] = []
    works: dict[str, Callable[[], float]] = {"ours": partial(timed, parts, model, device, samples)}
    if plain:
        works["plain"] = lambda: seconds_of(lambda: draw_plainly(model, samples, sampling))
    seconds = interleaved(works, repeats)
    total, limit = statistics.median(seconds["ours"]), sum(best.values())
    show(f"N={samples}{title}: {total:.2f} s, {total / limit:.2f} x the limit of {limit:.2f} s")
    rate = kernel_rate(model, 2 * samples)
    streaming = statistics.median(sum(run.seconds[name] for name in STREAMED) for run in parts[1:])
    share = streaming * rate / streamed_bytes(model)
    show(f"  torch multiplies {2 * samples} rows by {rate / 1e9:.1f} GB/s of weights; they take {share:.2f} x as long")
    if plain:
        ratio = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["plain"]))
        show(f"  the plain loop takes {statistics.median(seconds['plain']):.2f} s, {ratio:.2f} x as long")
    for name in [*best, "sampling", "rest"]:
        own = statistics.median(run.seconds[name] for run in parts[1:])  # the first is to warm up
        note = f"{own / best[name]:5.2f} x its limit" if name in best else ""
        show(f"  {name:22s} {own:8.3f} s {own / total:6.1%}  {note}")


def show(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="scaled")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="the plain loop runs on a CPU only")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--processor-time", action="store_true", help="not the wall's: where other jobs run")
    options = parser.parse_args()
    if options.processor_time:
        Watch.count_processor_time()
    check_codes()
    rates = limits(options.device)
    show(f"limits: {rates[0] / 1e9:.0f} GFLOP/s, {rates[1] / 1e9:.1f} GB/s")
    model = build(options.shape, torch.bfloat16, options.device)
    is_cpu = options.device == "cpu"
    best = {samples: part_limits(model, samples, *rates) for samples in options.samples}
    for samples in options.samples:
        measure(model, options.device, samples, options.repeats, best[samples], is_cpu, "")
    if is_cpu:
        pack_linears(model)
        for samples in options.samples:
            measure(model, options.device, samples, options.repeats, best[samples], False, ", packed")


if __name__ == "__main__":
    main()
