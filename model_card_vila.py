"""The model card of a repository: front matter for the Hub, and what a stranger must know.

- Everything is read from the configs and weights that are uploaded; what they cannot say comes from options.
- A card that somebody wrote is kept: its front matter is completed, and corrected where the folder knows better.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

from .commands_vila import one_line
from .configuration_vila import first
from .families_vila import VILA_HD, VILA_U
from .memory_vila import cached_values
from .staging_vila import Staged
from .tokenizer_files_vila import read_json

TEMPLATE = Path(__file__).with_name("model_cards") / "model_card.md.jinja"
CONTEXTS = (4096, 32768)
# the address that transformers' own documentation shows
PICTURE = "https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/pipeline-cat-chonk.jpeg"
LLAMA3_NOTICE = "Built with Meta Llama 3"
LLAMA3_TOKEN = "<|begin_of_text|>"
LONG_CONTEXT = 2**17
TILED_MODES = ("dynamic", "dynamic_s2")
WIDEST = (3000, 4000)  # rows and columns that are cut into as many tiles as a processor allows, where it cuts
PAPERS = {
    "vila": ("VILA: On Pre-training for Visual Language Models", "Lin, Ji and others", "2312.07533"),
    "nvila": ("NVILA: Efficient Frontier Visual Language Models", "Liu, Zhijian and others", "2412.04468"),
    "longvila": (
        "LongVILA: Scaling Long-Context Visual Language Models for Long Videos",
        "Chen, Yukang and others",
        "2408.10188",
    ),
    "ps3": ("Scaling Vision Pre-Training to 4K Resolution", "Shi, Baifeng and others", "2503.19903"),
    "vila-u": (
        "VILA-U: a Unified Foundation Model Integrating Visual Understanding and Generation",
        "Wu, Yecheng and others",
        "2409.04429",
    ),
    "awq": (
        "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
        "Lin, Ji and others",
        "2306.00978",
    ),
    "gptq": (
        "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        "Frantar, Elias and others",
        "2210.17323",
    ),
}
# what `rounding_method` says -> its paper
ROUNDING_PAPERS = {"awq": "awq", "llm-awq": "awq", "gptq": "gptq"}


@dataclass(frozen=True)
class CardOptions:
    """What no file of a checkpoint says.

    base_model: Hub ids of what it was made from. license: id of the weights' licence, see the Hub's list; for
    `"other"` also `license_name` and `license_link`. datasets: Hub ids of what it was trained on. language: codes.
    date: when it was trained. space: Hub id of a demo. new_card: replace a card that there is.
    """

    base_model: tuple[str, ...] = ()
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    datasets: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    date: str | None = None
    space: str | None = None
    new_card: bool = False


def model_card(staged: Staged, repo: str, options: CardOptions, previous: str | None = None) -> ModelCard:
    """The card of a staged folder.

    Args:
        repo: Hub id of the repository.
        previous: the text of a card that there is.

    Raises:
        ValueError: if a licence, or the base model of an int4 checkpoint, is neither given nor in `previous`, or
            `previous` has no readable front matter.
    """
    config, processor = load_parts(staged)
    known = ModelCardData() if previous is None else read_card(previous).data
    data = card_data(staged, config, options, known)
    if previous is not None and not options.new_card:
        card = read_card(previous)
        card.data = data
        return card
    facts = card_facts(staged, config, processor, data)
    return ModelCard.from_template(
        data, template_path=str(TEMPLATE), repo=repo, **facts, **option_facts(options, repo)
    )


def load_parts(staged: Staged) -> tuple[Any, Any]:
    """Config and processor.

    Raises:
        ValueError: if a file of theirs is damaged.
    """
    try:
        config = staged.family.config_class.from_pretrained(staged.folder)
        return config, staged.family.processor_class.from_pretrained(staged.folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"config or processor do not load: {one_line(error)}") from error


def read_card(text: str) -> ModelCard:
    try:
        return ModelCard(text, ignore_metadata_errors=True)
    except Exception as error:  # of the YAML parser, too
        raise ValueError(f"the front matter of README.md cannot be read: {one_line(error)}") from error


def card_data(staged: Staged, config: Any, options: CardOptions, known: Any) -> ModelCardData:
    """The front matter: the folder's facts win over what was known, options over both."""
    quantized = quantization(config)
    content = known.to_dict()
    content |= {"library_name": "transformers", "pipeline_tag": pipeline_tag(staged)}
    given = {
        "base_model": list(options.base_model),
        "license": options.license,
        "license_name": options.license_name,
        "license_link": options.license_link,
        "datasets": list(options.datasets),
        "language": list(options.language),
    }
    content |= {name: value for name, value in given.items() if value}
    tags = ["custom_code", "vila", staged.family.model_type.replace("_", "-")]
    if quantized is not None:
        content["base_model_relation"] = "quantized"
        tags += ["awq", "4-bit"] + ["gptq"] * (rounding_method(staged) == "gptq")
        if not content.get("base_model"):
            raise ValueError("an int4 checkpoint needs --base-model, the Hub id of what was quantised")
    content["tags"] = list(dict.fromkeys([*(content.get("tags") or []), *tags]))
    content.setdefault("widget", widget())
    check_licence(content)
    return ModelCardData(ignore_metadata_errors=True, **content)


def check_licence(content: dict[str, Any]) -> None:
    if not content.get("license"):
        raise ValueError(
            "the licence of the weights is not known: name it with --license, such as cc-by-nc-4.0; that of the "
            "weights they were made from travels with them"
        )
    if content["license"] == "other" and not (content.get("license_name") and content.get("license_link")):
        raise ValueError("--license other needs --license-name and --license-link")


def pipeline_tag(staged: Staged) -> str:
    return "any-to-any" if staged.family is VILA_U else "image-text-to-text"


def widget() -> list[dict[str, Any]]:
    """Examples of the page's widget, as messages."""
    questions = ["What is shown here?", "Which colours do you see? Answer briefly."]
    examples = []
    for question in questions:
        picture = {"type": "image_url", "image_url": {"url": PICTURE}}
        content = [picture, {"type": "text", "text": question}]
        examples.append({"messages": [{"role": "user", "content": content}]})
    return examples


def quantization(config: Any) -> dict[str, Any] | None:
    """The int4 options of a config, a dictionary or an object there."""
    found = getattr(config, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else found.to_dict()


def option_facts(options: CardOptions, repo: str) -> dict[str, Any]:
    return {"name": repo.rsplit("/", 1)[-1], "date": options.date or "not given", "space": options.space}


def card_facts(staged: Staged, config: Any, processor: Any, data: ModelCardData) -> dict[str, Any]:
    """What the template says of a checkpoint."""
    quantized, content = quantization(config), data.to_dict()
    tokens, tiles_shape = widest_picture(processor)
    looks, look = (config.num_look_close, look_tokens(config)) if staged.family is VILA_HD else (0, 0)
    side = tiles_shape[-1]
    weights = sum(shard.num_bytes for shard in staged.shards)
    return {
        "kind": staged.family.model_type,
        "architecture": staged.family.model_class.__name__,
        "base_models": as_list(content.get("base_model")),
        "datasets": as_list(content.get("datasets")),
        "licence": content.get("license_name") or content["license"],
        "licence_link": content.get("license_link"),
        "quantized": quantized and {"bits": quantized.get("bits", 4), "method": rounding_method(staged)},
        "llama3_notice": LLAMA3_NOTICE if is_llama3(config, processor) else None,
        "papers": papers(config, processor, staged),
        "parts": parts(config),
        "parameters": parameters(staged, quantized),
        "context": config.text_config.max_position_embeddings,
        "picture_tokens": tokens,
        "tiles": tiles_shape[0],
        "side": side,
        "looks": looks,
        "look_tokens": look,
        "frames": processor.num_video_frames,
        "dtype": str(config.dtype).removeprefix("torch."),
        "cache_bytes": f"{kv_bytes_per_token(config):,}",
        "memory": memory_table(config, weights, tokens + looks * look, math.prod(tiles_shape) * number_bytes(config)),
    }


def as_list(value: Any) -> list[str]:
    return [] if not value else [value] if isinstance(value, str) else list(value)


def widest_picture(processor: Any) -> tuple[int, torch.Size]:
    """Tokens of one picture at the most, and the shape `(tiles, 3, side, side)` of its pixels."""
    sizes = processor._get_num_multimodal_tokens(image_sizes=[WIDEST])
    pixels = processor.image_processor(Image.new("RGB", WIDEST[::-1]), return_tensors="pt")["pixel_values"]
    return sizes.num_image_tokens[0], pixels.shape


def look_tokens(config: Any) -> int:
    """Tokens that one look of a VILA-HD adds at the most: merged patches of all scales."""
    return -(-sum(config.vision_config.look_budget) // config.downsample_factor**2)


def number_bytes(config: Any) -> int:
    """Bytes of one number of what is computed with."""
    dtype = config.dtype
    return (getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32).itemsize


def kv_bytes_per_token(config: Any) -> int:
    """Bytes of keys and values that the language model keeps of one token, in the model's dtype."""
    return cached_values(config.text_config) * number_bytes(config)


def memory_table(config: Any, weight_bytes: int, picture_tokens: int, picture_bytes: int) -> list[dict[str, Any]]:
    """GB of weights, cache and pixels for contexts up to the model's own, filled with pictures."""
    longest = config.text_config.max_position_embeddings
    rows = []
    for tokens in sorted({context for context in CONTEXTS if context < longest} | {longest}):
        pictures = tokens // picture_tokens
        sizes = {
            "weights": weight_bytes / 1e9,
            "cache": tokens * kv_bytes_per_token(config) / 1e9,
            "pixels": pictures * picture_bytes / 1e9,
        }
        rows.append({"tokens": tokens, "pictures": pictures, "total": sum(sizes.values()), **sizes})
    return rows


def is_llama3(config: Any, processor: Any) -> bool:
    """Whether the language model is a Llama 3, whose licence asks for a notice."""
    return config.text_config.model_type == "llama" and LLAMA3_TOKEN in processor.tokenizer.get_vocab()


def is_llama3_card(text: str) -> bool:
    """Whether a card has that notice."""
    return LLAMA3_NOTICE in text


def papers(config: Any, processor: Any, staged: Staged) -> list[dict[str, str]]:
    """The papers of what the config uses."""
    keys = ["vila"]
    if processor.image_processor.image_mode in TILED_MODES or config.video_pool_sizes is not None:
        keys.append("nvila")
    if config.text_config.max_position_embeddings > LONG_CONTEXT:
        keys.append("longvila")
    keys += ["ps3"] * (staged.family is VILA_HD) + ["vila-u"] * (staged.family is VILA_U)
    if quantization(config) is not None and (method := rounding_method(staged)) in ROUNDING_PAPERS:
        keys.append(ROUNDING_PAPERS[method])
    return [dict(zip(("title", "author", "eprint"), PAPERS[key]), key=key) for key in keys]


def rounding_method(staged: Staged) -> str:
    """How the weights were rounded, as `python -m vila.quantize` reports it; the stored format is AWQ's either way."""
    path = staged.folder / "quantization_report.json"
    report = read_json(path) if path.is_file() else {}
    return "llm-awq" if "llm_awq" in report else str(report.get("method", "unknown"))


def parts(config: Any) -> list[tuple[str, str]]:
    """Tower, projector and language model in words."""
    vision, text = config.vision_config, config.text_config
    merges = config.downsample_factor
    projector = f"`{config.projector_type}`" + (f", merges {merges} x {merges} patches" if merges > 1 else "")
    tower = f"`{vision.model_type}`, {vision.hidden_size} wide, {vision.num_hidden_layers} layers, "
    scales = getattr(vision, "ps3_scales", None) or [first(vision.image_size)]
    tower += f"{', '.join(map(str, scales))} pixels a side, patches of {first(vision.patch_size)}"
    language = f"`{text.model_type}`, {text.hidden_size} wide, {text.num_hidden_layers} layers, "
    language += f"{text.num_attention_heads} heads, vocabulary of {text.vocab_size:,}"
    described = [("vision tower", tower), ("projector", projector), ("language model", language)]
    if hasattr(config, "code_depth"):
        codes = f"{config.code_depth} of {config.codebook_size:,} per position, by a depth transformer"
        described.append(("codes of pictures", f"{codes} of {config.depth_num_layers} layers"))
    return described


def parameters(staged: Staged, quantized: dict[str, Any] | None) -> str:
    if quantized is not None:
        return "those of what it was made from"
    numbers = sum(math.prod(shape) for shard in staged.shards for shape in shard.shapes.values())
    return f"{numbers / 1e9:.3g} billion" if numbers >= 1e9 else f"{numbers / 1e6:.3g} million"


__all__ = ["CardOptions", "is_llama3_card", "kv_bytes_per_token", "memory_table", "model_card"]
