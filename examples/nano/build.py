"""An untrained vila-nano as an ordinary folder: `python examples/nano/build.py FOLDER`.

An NVILA-Lite in small: dynamic tiles, a projector that merges patches, a video encoder that pools in time and space.

- The tokenizer is a byte-level BPE of the generator's own texts. Every digit and every capital of a printed string is
  a token, so that strings that were never seen are read letter by letter.
- The template has no system prompt.
"""

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from clips import FRAMES, FRAMES_PER_STEP
from dataset import TASKS
from drawing import SIDE
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, GenerationConfig, PreTrainedTokenizerFast
from vila import (
    VilaConfig,
    VilaForConditionalGeneration,
    VilaImageProcessor,
    VilaProcessor,
)
from vila.chat_templates_vila import SENTINEL
from vila.families_vila import VILA

TEMPLATE = Path(__file__).with_name("chat_template.jinja")
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# words with the blank before them; capitals that start no word, digits and blanks alone
PIECES = r" ?[A-Z]?[a-z]+|[A-Z]|\d|\s|[^\sA-Za-z\d]+"
VOCABULARY, TEXTS_PER_TASK = 1024, 150

PIXEL_MEAN, PIXEL_STD = 0.83, 0.18  # of what is drawn here
PATCH, MAX_TILES, MAX_POSITIONS, MAX_NEW_TOKENS = 11, 4, 2048, 128
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "image_size": SIDE,
    "patch_size": PATCH,
    "vision_use_head": False,
}
TEXT = {
    "model_type": "qwen2",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": True,
}


def training_texts() -> Iterator[str]:
    """Questions and answers of every task, and the names of the roles."""
    yield from ["user\n", "assistant\n"] * 100
    for name, task in TASKS.items():
        rng = random.Random(f"tokenizer/{name}")
        for _ in range(TEXTS_PER_TASK):
            for turn in task(rng, "train").turns:
                yield from (turn.question, turn.answer)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of the generator's texts, with Qwen2's control tokens and the media tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(training_texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=MAX_POSITIONS, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": PAD, "eos_token": END})
    others = (START, SENTINEL, VilaProcessor.image_token, VilaProcessor.video_token)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in others])
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    return tokenizer


def build_config(tokenizer: PreTrainedTokenizerFast) -> VilaConfig:
    config = VilaConfig(
        vision_config=dict(VISION),
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        image_token_id=tokenizer.convert_tokens_to_ids(VilaProcessor.image_token),
        video_token_id=tokenizer.convert_tokens_to_ids(VilaProcessor.video_token),
        projector_type="mlp_downsample",
        vision_feature_layer=-1,  # no layer is built in vain
        vision_chunk_size=64,  # so small a tower is the faster the more tiles it is given
        video_pool_sizes=[[FRAMES_PER_STEP, 2, 2]],
    )
    config.architectures, config.auto_map = ["VilaForConditionalGeneration"], VILA.auto_map
    return config


def build_processor(tokenizer: PreTrainedTokenizerFast, config: VilaConfig) -> VilaProcessor:
    image_processor = VilaImageProcessor(
        image_mode="dynamic",
        size={"height": SIDE, "width": SIDE},
        min_tiles=1,
        max_tiles=MAX_TILES,
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )
    return VilaProcessor(
        image_processor,
        tokenizer,
        chat_template=tokenizer.chat_template,
        num_tile_tokens=config.num_tile_tokens,
        video_as_images=False,
        num_video_frames=FRAMES,
        video_pool_sizes=config.video_pool_sizes,
    )


def build_model(config: VilaConfig, seed: int = 0) -> VilaForConditionalGeneration:
    """Random weights, the same for the same seed."""
    torch.manual_seed(seed)
    model = VilaForConditionalGeneration(config)
    tokens = {"eos_token_id": config.text_config.eos_token_id, "pad_token_id": config.text_config.pad_token_id}
    media = [config.image_token_id, config.video_token_id]
    model.generation_config = GenerationConfig(**tokens, max_new_tokens=MAX_NEW_TOKENS, suppress_tokens=media)
    return model


def save(model: VilaForConditionalGeneration, processor: VilaProcessor, folder: Path, dtype: torch.dtype) -> None:
    """An ordinary folder, with the modules that `auto_map` reaches."""
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    VILA.copy_code(folder)


def build(folder: str | Path, seed: int = 0) -> Path:
    """Writes an untrained model, in float32."""
    tokenizer = build_tokenizer()
    config = build_config(tokenizer)
    save(build_model(config, seed), build_processor(tokenizer, config), Path(folder), torch.float32)
    return Path(folder)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="build.py", description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    sys.stdout.write(f"{build(options.folder, options.seed)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
