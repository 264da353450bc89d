"""Tokenizers of original checkpoints: reading them with the media tokens added, and writing them back."""

import json
import re
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from .chat_templates_vila import SENTINEL
from .processing_vila import VilaProcessor


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent.name}/{path.name} is missing")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.parent.name}/{path.name} is no valid JSON") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.parent.name}/{path.name} holds no JSON object")
    return content


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The language model's tokenizer with the media tokens, in the order that gives the original's ids."""
    folder = folder / "llm" if (folder / "llm").is_dir() else folder
    needs_sentencepiece = not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file()
    if needs_sentencepiece and not (is_sentencepiece_available() and is_protobuf_available()):
        raise ValueError("reading llm/tokenizer.model needs sentencepiece: pip install 'vila-hf[convert]'")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for key in ("is_local", "local_files_only"):  # how it was loaded, not what it is
        tokenizer.init_kwargs.pop(key, None)
    media_tokens = (SENTINEL, VilaProcessor.image_token, VilaProcessor.video_token)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in media_tokens])
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_original_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Tokenizer files as transformers 4 reads them: its class names, and the chat template inside the config."""
    tokenizer.padding_side = "right"
    template = re.sub(r"\{%-? (end)?generation -?%\}", "", str(tokenizer.chat_template or ""))
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    content = read_json(folder / "tokenizer_config.json")
    for key in ("auto_map", "backend", "processor_class"):
        content.pop(key, None)
    if isinstance(content.get("extra_special_tokens"), list):
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    if content.get("tokenizer_class") not in ("LlamaTokenizer", "Qwen2Tokenizer"):
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    if content["tokenizer_class"] == "LlamaTokenizer":
        content["legacy"] = False
    content["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    if content["tokenizer_class"] == "Qwen2Tokenizer":
        model = read_json(folder / "tokenizer.json")["model"]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


def save_original_u_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The files that the original VILA-U reads beside `tokenizer.model`.

    It finds its tokens by counting from the end of the vocabulary: those of this package must not be among them.
    """
    own = {SENTINEL, VilaProcessor.image_token, VilaProcessor.video_token}
    added = {number: token for number, token in tokenizer.added_tokens_decoder.items() if token.content not in own}
    named = {f"{kind}_token": str(getattr(tokenizer, f"{kind}_token")) for kind in ("bos", "eos", "pad", "unk")}
    further = [token.content for _, token in sorted(added.items()) if token.content not in named.values()]
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    config: dict[str, Any] = {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": True,
        "added_tokens_decoder": {
            str(number): {field: getattr(token, field) for field in fields} for number, token in sorted(added.items())
        },
        "additional_special_tokens": further,
        **named,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": tokenizer.model_max_length,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "LlamaTokenizer",
    }
    files: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": config,
        "special_tokens_map.json": {**named, "additional_special_tokens": further},
        "added_tokens.json": {token: tokenizer.convert_tokens_to_ids(token) for token in further},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
