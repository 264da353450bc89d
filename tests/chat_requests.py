"""What tests ask a model for in a chat, and what they compare of its answers."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

NEW_TOKENS = 5


def noise_picture(seed, size=(60, 60)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def user(*content):
    """A message of text, pictures, and videos: files or frames."""

    def block(part):
        if isinstance(part, str):
            return {"type": "text", "text": part}
        kind = "image" if isinstance(part, Image.Image) else "video"
        return {"type": kind, kind: str(part) if isinstance(part, Path) else part}

    return {"role": "user", "content": [block(part) for part in content]}


def said(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def encode(processor, chats, **processor_kwargs):
    """One chat or a batch of them as `generate` takes it."""
    return processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=processor_kwargs,
    )


def logits(model, inputs, **options):
    """Logits of every new token, `(batch, new, vocab)`; no row stops early. A small model may say the same about any
    picture, so equal tokens prove little; these tell a wrong picture, position or mask apart."""
    options = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "eos_token_id": model.config.video_token_id,
        **options,
    }
    output = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    return torch.stack(output.logits, dim=1)


def assert_same(actual, expected):
    """Logits of the same tokens, within what another order of the same sums makes of them."""
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
