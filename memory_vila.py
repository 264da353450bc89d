"""What a prompt needs, from a config alone: tokens of frames, bytes of weights, of the cache and of one chunk.

- Nothing is loaded or measured; `benchmarks/long_video.py` compares with what a process takes.
- A prompt of more than 8,192 tokens is prefilled in chunks, and with `stream_frames=True` its frames are encoded chunk
  by chunk: what grows with it is the cache, and, on a GPU without flash attention, what attention in a chunk needs.
  Where frames cannot be streamed, the pixels of all of them are counted with the chunk.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import nn

from .cache_vila import ROOM
from .configuration_vila import first
from .context_vila import context_length
from .geometry_vila import patches_per_side, pooled_frames

# prompts of more tokens go through the language model in chunks of so many, unless the caller says otherwise
LONG_PROMPT, PREFILL_CHUNK = 8192, 2048
# for what is asked and answered beside the frames
TEXT_TOKENS = 512
# bits of a weight beside its own: AWQ's scale and zero for every 128
GROUP_BITS = 32 / 128
# the same of transformers' quantised caches, for every 64
CACHE_GROUP_BITS = 32 / 64
# the family whose frames can be decoded while they are encoded; those of others are all held
STREAMED_FAMILY = "vila"
# attention that repeats the keys that heads share, and holds a mask, while a chunk looks back
MASKED_ATTENTION = "sdpa"
SHOWN_FRAMES = (64, 256, 1024, 2048)


class Need(NamedTuple):
    """What a prompt with so many frames takes: tokens, and bytes."""

    frames: int
    tokens: int
    weights: int
    cache: int
    chunk: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.chunk


class MemoryPlan:
    """What prompts of one model need.

    Args:
        config: a `VilaConfig`, or of a family that derives from it.
        weights: bytes of the weights, see `weight_bytes`.
        frame_wrapping: tokens around every frame; the line break of most checkpoints is one.
        text_tokens: tokens of the prompt that are no frames, and of the answer.
        value_bytes: of an activation, and of a value in the cache.
        cache_bits: of a value in a quantised cache of transformers; None where it is not quantised.
        attention: `"sdpa"`, transformers' on a GPU, which needs memory for what a chunk looks back on; any other
            (`"flash_attention_2"`, `"sdpa_cpu"`) does not.
        chunk: `prefill_chunk_size`; by default what `generate()` takes.
    """

    def __init__(
        self,
        config: Any,
        weights: int,
        frame_wrapping: int = 1,
        text_tokens: int = TEXT_TOKENS,
        value_bytes: int = 2,
        cache_bits: int | None = None,
        attention: str = MASKED_ATTENTION,
        chunk: int | None = None,
    ):
        self.config, self.text, self.weights = config, config.text_config, weights
        self.frame_wrapping, self.text_tokens, self.value_bytes = frame_wrapping, text_tokens, value_bytes
        self.cache_bits, self.attention, self.chunk = cache_bits, attention, chunk
        self.key_heads, self.head_size = key_shape(self.text)

    def need(self, frames: int) -> Need:
        tokens = self.tokens(frames)
        chunk = self.chunk_bytes(tokens) + frames * self.held_bytes()
        return Need(frames, tokens, self.weights, self.cache_bytes(tokens), chunk)

    def tokens(self, frames: int) -> int:
        """Of the whole prompt and its answer."""
        pools = pooled_frames(frames, math.isqrt(self.config.num_tile_tokens), self.config.video_pool_sizes)
        return self.text_tokens + sum(kept * (rows + self.frame_wrapping) for kept, rows in pools if frames)

    def cache_bytes(self, tokens: int) -> int:
        """Keys and values of all layers."""
        values = cached_values(self.text)
        if self.cache_bits is None:
            return (tokens + ROOM) * values * self.value_bytes
        # one layer is there as it was, while it is attended to
        whole = values // self.text.num_hidden_layers * self.value_bytes
        return math.ceil(tokens * (values * (self.cache_bits + CACHE_GROUP_BITS) / 8 + whole))

    def chunk_bytes(self, tokens: int) -> int:
        """The most that is held at a time while a chunk of the prompt, or of its frames, is computed."""
        chunk = self.chunk or (tokens if tokens <= LONG_PROMPT else PREFILL_CHUNK)
        length, heads = min(chunk, tokens), self.text.num_attention_heads * self.head_size
        # embeddings, a layer's input, its residual and normalised states; sines and cosines
        held = length * (4 * self.text.hidden_size + 2 * self.head_size) * self.value_bytes
        # gate, up and their product; queries, keys, values and output
        gates = 3 * length * self.text.intermediate_size * self.value_bytes
        attention = 2 * length * (heads + self.key_heads * self.head_size) * self.value_bytes
        if self.attention == MASKED_ATTENTION and tokens > chunk:
            held += chunk * tokens  # a boolean mask, for all layers, and in each as the kernel takes it
            attention += chunk * tokens * self.value_bytes
            attention += 2 * tokens * heads * self.value_bytes if heads > self.key_heads * self.head_size else 0
        return max(held + max(gates, attention) + self.text.vocab_size * 4, self.encoding_bytes())

    def held_bytes(self) -> int:
        """Pixels of one frame, where those of all are there until the prompt is prefilled."""
        if self.config.model_type == STREAMED_FAMILY:
            return 0
        vision = self.config.vision_config
        # PS3 is given the largest of its scales
        return 3 * getattr(vision, "input_size", first(vision.image_size)) ** 2 * 4

    def encoding_bytes(self) -> int:
        """Pixels and tower states of the frames that are encoded together."""
        vision, frames = self.config.vision_config, self.config.vision_chunk_size or 8
        side = first(vision.image_size)
        patches = patches_per_side(side, first(vision.patch_size)) ** 2
        states = patches * (4 * vision.hidden_size + 2 * vision.intermediate_size) * self.value_bytes
        return frames * (3 * side**2 * (4 + self.value_bytes) + states)

    def most_frames(self, tokens: float = math.inf, total: float = math.inf) -> int:
        """The most frames that so many tokens, and so many bytes in all, hold; -1 if not even none."""

        def fits(frames: int) -> bool:
            need = self.need(frames)
            return need.tokens <= tokens and need.total <= total

        # a prompt that is just short enough to go through as a whole may need more than a longer one in chunks
        whole = largest(lambda frames: self.tokens(frames) <= LONG_PROMPT, 0)
        start = whole + 1 if fits(whole + 1) else 0
        return largest(fits, start) if fits(start) else -1

    def shown_frames(self, *more: int) -> list[int]:
        """Numbers of frames for a table: the usual ones, those asked for, and the most that fit the context."""
        context = context_length(self.text)
        most = self.most_frames(context) if context < math.inf else 0
        return sorted({count for count in (*SHOWN_FRAMES, most, *more) if count > 0})

    def table(self, frames: Iterable[int], context: float | None = None) -> str:
        """A row for each number of frames, with what it takes in GB, and whether the context holds it."""
        context = context_length(self.text) if context is None else context
        lines = ["| frames | tokens | weights, GB | cache, GB | one chunk, GB | in all, GB | fits the context |"]
        lines.append("|---" * 7 + "|")
        for need in map(self.need, frames):
            gigabytes = " | ".join(map(in_gigabytes, (*need[2:], need.total)))
            lines.append(
                f"| {need.frames} | {need.tokens} | {gigabytes} | {'yes' if need.tokens <= context else 'no'} |"
            )
        return "\n".join(lines)


def largest(fits: Callable[[int], bool], start: int) -> int:
    """The last number from `start` on that fits, of which no larger one does behind one that does not."""
    low, high = start, start + 1
    while fits(high):
        if high > 2**40:
            raise ValueError("most_frames needs a limit of tokens or of bytes")
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def key_shape(text_config: Any) -> tuple[int, int]:
    """Heads of keys and values, and numbers of each."""
    heads = text_config.num_attention_heads
    size = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    return getattr(text_config, "num_key_value_heads", None) or heads, size


def cached_values(text_config: Any) -> int:
    """Numbers that the cache of all layers holds of one token."""
    return 2 * text_config.num_hidden_layers * math.prod(key_shape(text_config))


def in_gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f}" if size >= 1e9 else f"{size / 1e9:.2g}"


def weight_bytes(model: nn.Module, bits: int = 16, value_bytes: int = 2) -> int:
    """Bytes of a model's weights, which may lie on the meta device.

    Args:
        bits: 4 or 8 round the layers of the language model, as `python -m vila.quantize` does; its embeddings and
            head, the tower and the projector keep `value_bytes`.
    """
    sizes = {id(weight): weight.numel() * value_bytes for weight in model.parameters()}
    if bits < 16:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "language_model." in name:
                sizes[id(module.weight)] = math.ceil(module.weight.numel() * (bits + GROUP_BITS) / 8)
    return sum(sizes.values())


def loaded_bytes(model: nn.Module) -> int:
    """Bytes of the weights of a model that is loaded, as they are."""
    return sum(tensor.nbytes for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
