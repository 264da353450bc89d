"""Ways to attend on a CPU, beside torch's fused kernel: `python benchmarks/attention.py [--no-compile]`.

- A picture: 1,024 tokens, 8 heads of 72 channels, bfloat16, as SigLIP has them; also how far the result is from
  float64, for scores with a standard deviation of 1 and of 4.
- A new token: 16 heads on 4 key heads, and 32 on 32, over 1,300 tokens, with a padding mask and without.

Prints milliseconds, the median of interleaved runs, and their ratio to the kernel's.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.qwen2.modeling_qwen2 import eager_attention_forward as eager_token
from transformers.models.siglip.modeling_siglip import eager_attention_forward as eager_picture
from vila.attention_vila import cpu_attention_forward

Works = dict[str, Callable[[], torch.Tensor]]


def measure(works: Works, repeats: int) -> dict[str, float]:
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def show(title: str, works: Works, repeats: int, notes: dict[str, str] | None = None) -> None:
    sys.stdout.write(title + "\n")
    seconds = measure(works, repeats)
    for name, value in seconds.items():
        note = (notes or {}).get(name, "")
        sys.stdout.write(f"  {name:14s} {value * 1e3:8.2f} ms {value / seconds['sdpa']:6.2f} {note}\n")


def states(heads: int, key_heads: int, queries: int, keys: int, channels: int, spread: float = 1.0) -> list:
    shapes = [(queries, heads), (keys, key_heads), (keys, key_heads)]
    random = [torch.randn(1, length, count, channels).transpose(1, 2) for length, count in shapes]
    return [random[0] * spread, random[1] * spread, random[2]]


def picture_works(exact: list, is_compiled: bool) -> Works:
    layer = SimpleNamespace(num_key_value_groups=1, is_causal=False, training=False)
    halves = [state.to(torch.bfloat16) for state in exact]
    scale = halves[0].shape[-1] ** -0.5
    works: Works = {
        "sdpa": lambda: sdpa_attention_forward(layer, *halves, None)[0],
        "eager": lambda: eager_picture(layer, *halves, None, scaling=scale)[0],
        "sdpa_cpu": lambda: cpu_attention_forward(layer, *halves, None)[0],
        "sdpa, float32": lambda: sdpa_attention_forward(layer, *(half.float() for half in halves), None)[0],
    }
    if is_compiled:
        compiled = torch.compile(flex_attention)
        works["flex, compiled"] = lambda: compiled(*halves).transpose(1, 2)
    return works


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true", help="leave flex attention out, which takes a compiler")
    options = parser.parse_args()
    torch.manual_seed(0)
    for spread in (1.0, 2.0):
        exact = states(8, 8, 1024, 1024, 72, spread)
        works = picture_works(exact, not options.no_compile)
        target = F.scaled_dot_product_attention(*(state.double() for state in exact)).transpose(1, 2)
        errors = {name: ((work().double() - target).norm() / target.norm()).item() for name, work in works.items()}
        notes = {name: f"error {error:.4f}" for name, error in errors.items()}
        show(f"a picture, scores of +-{spread**2:.0f}", works, options.repeats, notes)
    for heads, key_heads, channels in ((16, 4, 64), (32, 32, 128)):
        halves = [state.to(torch.bfloat16) for state in states(heads, key_heads, 1, 1300, channels)]
        layer = SimpleNamespace(num_key_value_groups=heads // key_heads, is_causal=True, training=False)
        for name, mask in (("no mask", None), ("a mask", torch.ones(1, 1, 1, 1300, dtype=torch.bool))):
            additive = None if mask is None else torch.zeros(mask.shape, dtype=torch.bfloat16)
            works = {
                "sdpa": lambda layer=layer, halves=halves, mask=mask: sdpa_attention_forward(layer, *halves, mask)[0],
                "eager": lambda layer=layer, halves=halves, mask=additive: eager_token(
                    layer, *halves, mask, scaling=0.1
                )[0],
                "sdpa_cpu": lambda layer=layer, halves=halves, mask=mask: cpu_attention_forward(layer, *halves, mask)[
                    0
                ],
            }
            show(f"a new token, {heads} heads on {key_heads}, {name}", works, options.repeats)


if __name__ == "__main__":
    main()
