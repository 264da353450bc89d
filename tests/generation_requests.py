"""Models whose towers are watched, and the chats that they continue."""

import torch
from chat_requests import encode, noise_picture, user
from transformers import AutoProcessor, DynamicCache, StaticCache
from vila.modeling_vila import VilaForConditionalGeneration

NEW_TOKENS = 8
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
CHECKPOINTS = ("nvila_lite_image", "nvila_dynamic_s2_image", "vila15_s2_image", "vila15_llama3_image")
TILING = ("nvila_lite_image", "nvila_dynamic_s2_image")

RED, WIDE, TALL = noise_picture(1), noise_picture(2, (200, 70)), noise_picture(3, (70, 160))

ONE = [user(WIDE, "What is this?")]
TWO = [user(RED, TALL, "Compare them, please.")]
TEXT = [user("Hello!")]
MIXED = [TEXT, ONE, TWO]


class Loaded:
    """A model, its processor, and counters of what the tower was given."""

    def __init__(self, folder):
        self.model = VilaForConditionalGeneration.from_pretrained(folder, dtype="float32").eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.never_sampled = self.model.config.video_token_id
        self.tiles = []
        self.model.model.vision_tower.register_forward_pre_hook(
            lambda module, args, kwargs: self.tiles.append(len(kwargs["pixel_values"])), with_kwargs=True
        )

    def encode(self, chat):
        return encode(self.processor, chat, tile_multiple_images=True)

    def run(self, inputs, **options):
        """The whole output of `generate`; no row stops early unless `options` name a stop token."""
        options = {**GREEDY, "eos_token_id": self.never_sampled, **options}
        return self.model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)

    def generate(self, inputs, **options):
        """New tokens, `(batch, new)`."""
        return self.run(inputs, **options).sequences[:, inputs["input_ids"].shape[1] :]

    def logits(self, inputs, **options):
        """Logits of every new token, `(batch, new, vocab)`."""
        return torch.stack(self.run(inputs, **options).logits, dim=1)


def dynamic_cache(case):
    return DynamicCache(config=case.model.config.text_config)


def static_cache(case):
    return StaticCache(config=case.model.config.text_config, max_cache_len=1024)


def answer(case, inputs, text, cache):
    """Generates exactly `text` and the end of the turn, so that the chat processed again has the cached prefix."""
    ids = [*case.processor.tokenizer(text, add_special_tokens=False)["input_ids"], end_of_turn(case)]
    start = inputs["input_ids"].shape[1]
    output = case.model.generate(
        **inputs,
        max_new_tokens=len(ids),
        do_sample=False,
        eos_token_id=case.never_sampled,
        past_key_values=cache,
        prefix_allowed_tokens_fn=lambda batch, row: [ids[len(row) - start]],
    )
    assert output[0, start:].tolist() == ids
    return output


def end_of_turn(case):
    return case.model.generation_config.eos_token_id[0]


CONTINUATIONS = {
    "new picture": ([user(RED, "What?")], [user(TALL, "And this?")]),
    "new tiled picture": ([user(WIDE, "What?")], [user(TALL, "And this?")]),
    "two new pictures": ([user(WIDE, "What?")], [user(RED, TALL, "And these?")]),
    "new text": ([user(WIDE, "What?")], [user("Really?")]),
    "first picture late": ([user("Hi")], [user(WIDE, "What?")]),
    "text only": ([user("Hi")], [user("And?")]),
}
