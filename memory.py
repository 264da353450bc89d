"""Says beforehand what frames need: `vila-memory MODEL --frames N --context T [--bits 4]`.

Tokens and gigabytes for the frames asked for and for others, and how many frames fit the context and the memory.
Computed from the config: no weights are read.
"""

import argparse
import math
import os
import sys
from typing import Any

import torch

from .commands_vila import USER_ERRORS
from .context_vila import context_length
from .loading_vila import Checkpoint
from .memory_vila import TEXT_TOKENS, MemoryPlan, in_gigabytes, weight_bytes


def plan_of(checkpoint: Checkpoint, options: argparse.Namespace) -> tuple[MemoryPlan, int]:
    """What prompts of a checkpoint need, and the frames that it takes of a video by default."""
    processor = checkpoint.load_processor()
    config = checkpoint.family.config_class.from_pretrained(checkpoint.folder)
    with torch.device("meta"):
        model = checkpoint.family.model_class(config)
    stored: Any = getattr(config, "quantization_config", None) or {}
    stored_bits = stored.get("bits") if isinstance(stored, dict) else getattr(stored, "bits", None)
    weights = weight_bytes(model, options.bits or stored_bits or 16)
    ends = (processor.image_start_tokens, processor.image_end_tokens)
    if not processor.video_as_images:
        ends = (processor.video_start_tokens, processor.video_end_tokens)
    plan = MemoryPlan(
        config,
        weights,
        frame_wrapping=sum(len(processor._wrapping_ids(text)) for text in ends),
        text_tokens=options.text_tokens,
        cache_bits=options.cache_bits,
        attention=options.attention,
        chunk=options.chunk,
    )
    return plan, processor.num_video_frames


def report(plan: MemoryPlan, frames: int, context: float, memory: int) -> str:
    """The table, and what fits.

    Raises:
        ValueError: if the frames do not fit the context; the table comes with it.
    """
    limit = context_length(plan.text)
    usable = min(context, limit)
    fitting = max(plan.most_frames(usable), 0) if usable < math.inf else math.inf
    table = plan.table(plan.shown_frames(frames), usable)
    need = plan.need(frames)
    if context > limit and context < math.inf:
        raise ValueError(
            f"a context of {context} tokens is asked for, the model was made for {limit} "
            f"(text_config.max_position_embeddings)\n{table}"
        )
    if need.tokens > usable:
        raise ValueError(
            f"{frames} frames take {need.tokens} tokens, more than the {usable} of the context: "
            f"{fitting} frames fit\n{table}"
        )
    lines = [table, ""]
    if usable < math.inf:
        lines.append(f"{usable} tokens of context hold {fitting} frames")
    held_frames = plan.most_frames(total=memory)
    held = f"hold {held_frames} frames" if held_frames >= 0 else "do not hold the model"
    lines.append(f"{in_gigabytes(memory)} GB of memory {held}; {frames} frames take {in_gigabytes(need.total)} GB")
    return "\n".join(lines)


def device_memory() -> int:
    """Bytes of the GPU, or of the machine where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def count(least: int) -> Any:
    """An argparse type: a whole number of at least that."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return value

    return parse


def gigabytes(text: str) -> int:
    """An argparse type: a positive number of GB -> bytes."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no positive number of GB")
    return int(value * 1e9)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="vila-memory", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("model", help="converted or original folder or Hub id")
    add("--frames", type=count(0), metavar="N", help="frames of a video (default: the checkpoint's)")
    add("--context", type=count(1), metavar="T", help="tokens of prompt and answer at most (default: the model's)")
    add("--bits", type=int, choices=(4, 8, 16), help="of a weight of the language model (default: the checkpoint's)")
    add("--cache-bits", type=int, choices=(2, 4, 8), help="of a value in a quantised cache (default: not quantised)")
    add("--memory", type=gigabytes, metavar="GB", help="that may be taken (default: what the GPU or machine has)")
    add("--attention", default="sdpa", choices=("sdpa", "sdpa_cpu", "flash_attention_2"), help="default: %(default)s")
    add("--chunk", type=count(1), metavar="N", help="prefill_chunk_size (default: that of generate())")
    add("--text-tokens", type=count(0), default=TEXT_TOKENS, metavar="N", help="beside frames (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        plan, default_frames = plan_of(Checkpoint(options.model), options)
        frames = default_frames if options.frames is None else options.frames
        memory = device_memory() if options.memory is None else options.memory
        sys.stdout.write(report(plan, frames, options.context or math.inf, memory) + "\n")
    except USER_ERRORS as error:
        sys.exit(f"vila-memory: {error}")


if __name__ == "__main__":
    main()
