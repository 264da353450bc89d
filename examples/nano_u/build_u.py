"""An untrained vila-u-nano as an ordinary folder: a VILA-U in small, for pictures of 64 pixels."""

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from drawn_scenes import SIDE, Scene, answering_row, draw_scene
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, GenerationConfig, PreTrainedTokenizerFast
from vila import VilaImageProcessor, VilaUConfig, VilaUForConditionalGeneration, VilaUProcessor
from vila.chat_templates_vila import SENTINEL
from vila.families_vila import VILA_U
from vila.original_config_vila_u import drawing_options

TEMPLATE = Path(__file__).with_name("chat_template.jinja")
PAD, END = "<pad>", "</s>"
MEDIA_TOKENS = ("<im_start>", "<im_end>", "<vi_start>", "<vi_end>")
VOCABULARY, TEXTS = 512, 400
MAX_POSITIONS, MAX_NEW_TOKENS = 1024, 48
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
    "vision_use_head": False,
}
TEXT = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": False,
}
CODES = {
    "codebook_size": 256,
    "code_depth": 4,
    "shared_codebook": False,
    "depth_hidden_size": 192,
    "depth_num_layers": 3,
    "depth_num_heads": 3,
    "depth_dropout": 0.0,
    "decoder_channels": 32,
    "decoder_channel_multipliers": [1, 1, 2, 2],
    "decoder_num_res_blocks": 1,
    "decoder_attention_resolutions": [8],
    "decoder_resolution": SIDE,
    "decoder_latent_channels": 64,
}


def training_texts() -> Iterator[str]:
    rng = random.Random("tokenizer")
    for _ in range(TEXTS):
        scene: Scene = draw_scene(rng, "train")
        yield f"USER: {scene.text} ASSISTANT: "
        for message in answering_row(rng, "train"):
            yield from (block["text"] for block in message["content"] if block["type"] == "text")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of the generator's own texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(training_texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=MAX_POSITIONS, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": PAD, "eos_token": END})
    others = (*MEDIA_TOKENS, SENTINEL, VilaUProcessor.image_token, VilaUProcessor.video_token)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in others])
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    return tokenizer


def build_config(tokenizer: PreTrainedTokenizerFast) -> VilaUConfig:
    ids = {
        "image_token_id": VilaUProcessor.image_token,
        "video_token_id": VilaUProcessor.video_token,
        "image_start_token_id": "<im_start>",
        "video_start_token_id": "<vi_start>",
    }
    special = {"bos_token_id": None, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = VilaUConfig(
        vision_config=dict(VISION),
        text_config={**TEXT, **special, "vocab_size": len(tokenizer)},
        vision_feature_layer=-1,
        **CODES,
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()},
    )
    config.architectures, config.auto_map = ["VilaUForConditionalGeneration"], VILA_U.auto_map
    return config


def build_processor(tokenizer: PreTrainedTokenizerFast, config: VilaUConfig) -> VilaUProcessor:
    size = {"height": SIDE, "width": SIDE}
    image_processor = VilaImageProcessor(
        image_mode="resize", size=size, do_center_crop=True, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return VilaUProcessor(
        image_processor,
        tokenizer,
        chat_template=tokenizer.chat_template,
        num_tile_tokens=config.num_tile_tokens,
        image_end_tokens=None,
    )


def build_model(config: VilaUConfig, seed: int = 0) -> VilaUForConditionalGeneration:
    """Random weights, the same for the same seed."""
    torch.manual_seed(seed)
    model = VilaUForConditionalGeneration(config)
    text = config.text_config
    model.generation_config = GenerationConfig(
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        max_new_tokens=MAX_NEW_TOKENS,
        suppress_tokens=[config.image_token_id, config.video_token_id],
        drawing=drawing_options(config),
    )
    return model


def save(model: VilaUForConditionalGeneration, processor: VilaUProcessor, folder: Path, dtype: torch.dtype) -> None:
    """An ordinary folder, with the modules that `auto_map` reaches."""
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    VILA_U.copy_code(folder)


def build(folder: str | Path, seed: int = 0) -> Path:
    """Writes an untrained model, in float32."""
    tokenizer = build_tokenizer()
    config = build_config(tokenizer)
    save(build_model(config, seed), build_processor(tokenizer, config), Path(folder), torch.float32)
    return Path(folder)
