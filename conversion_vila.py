"""Original checkpoint folders <-> folders that transformers loads. `vila-convert` on the command line.

- By default no weight is copied: the new folder links to the original files, and an index names every weight.
- `--copy` writes root shards, which serving engines read, in the memory of one shard.
- `--to-original` goes back to `llm/`, `vision_tower/`, `mm_projector/` for tools that know only that layout.
"""

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .chat_templates_vila import CONV_MODES, choose_chat_template, choose_vila_u_template, stop_token_ids
from .configuration_vila import ORIGINAL_CONFIG_KEYS, VilaConfig
from .families_vila import FAMILIES, PS3, VILA_HD, VILA_U, Family, family_of
from .original_config_vila import to_image_processor, to_processor_options, to_vila_config
from .original_config_vila_hd import to_ps3_config, to_ps3_image_processor, to_vila_hd_config, to_vila_hd_processor
from .original_config_vila_u import drawing_options, to_vila_u_config, to_vila_u_processor
from .processing_vila import VilaProcessor
from .to_original_vila import to_original
from .tokenizer_files_vila import load_tokenizer, read_json
from .weight_files_vila import DTYPES, Shard, copy_to_root, find_shards, index_parts, link_parts, part_shards
from .weight_names_vila import PART_PREFIXES

BACKUP_FOLDER = "original_files"
DEFAULT_MAX_NEW_TOKENS = 1024
HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt", "LICENSE*", "README.md"]


def convert(
    source: str | Path,
    target: str | Path | None = None,
    *,
    conv_mode: str = "auto",
    copy: bool = False,
    in_place: bool = False,
) -> Path:
    """Makes an original VILA checkpoint loadable with `AutoModel.from_pretrained`.

    Args:
        source: folder or Hub id in the research layout (`llm/`, `vision_tower/`, `mm_projector/`) or the remote-code
            layout (the same folders with other code).
        target: new folder; by default the source's name with `-hf` in the current directory.
        conv_mode: chat template, one of `CONV_MODES`; `"auto"` takes the tokenizer's, for Llama models the one of
            VILA-1.5.
        copy: write self-contained root shards instead of links.
        in_place: write into the source; every file that would be overwritten is saved in `original_files/` first.

    Returns:
        The folder that loads.

    Raises:
        ValueError, FileNotFoundError: if the source is not an original checkpoint or not complete; nothing is written.
        FileExistsError: if the target exists and is not empty.
    """
    # a Hub id's last part, or the folder's own name
    name = Path(source).resolve().name if Path(source).is_dir() else str(source).rsplit("/", 1)[-1]
    if in_place and (target is not None or copy or not Path(source).is_dir()):
        raise ValueError("--in-place needs a folder and takes neither a target nor --copy")
    source = resolve_source(source)
    root = read_root_config(source)
    family = family_of(root)
    shards = {"": find_shards(source)} if family is PS3 else part_shards(source)
    if in_place:
        target = source
    else:
        target = Path(target) if target is not None else Path(name + "-hf")
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise FileExistsError(f"{target} exists and is not empty")
    with tempfile.TemporaryDirectory() as staging_name:
        staging = Path(staging_name)
        try:
            dtype = DTYPES.get(next(iter(shards.values()))[0].dtype, "float32")
            write = write_encoder_metadata if family is PS3 else write_metadata
            config = write(source, root, staging, conv_mode, dtype)
        except StrictDataclassError as error:
            raise ValueError(f"a config of {source} makes no sense: {error}") from error
        shards = family.used_shards(shards, config)
        check_weights(family, config, shards)
        if not copy:
            index_parts(shards, staging, separator="/" if in_place else "-")
        target.mkdir(parents=True, exist_ok=True)
        place_files(staging, target)
    if copy:
        copy_to_root(shards, target)
    elif not in_place:
        link_parts(shards, target)
    return target


def resolve_source(source: str | Path) -> Path:
    """A local folder, or the snapshot of a Hub repository; a sub-folder `model/` is entered."""
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(source), allow_patterns=HUB_FILES))
        except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
            raise FileNotFoundError(f"{str(source)!r} is neither a folder nor a repository on the Hub") from error
    return folder / "model" if (folder / "model" / "config.json").is_file() else folder


def read_root_config(source: Path) -> dict[str, Any]:
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} has no config.json")
    root = read_json(source / "config.json")
    # an original PS3 config has sub-configs, too, with other options
    is_encoder = FAMILIES.get(str(root.get("model_type"))) is PS3
    if "position_grid" in (root.get("vision_config") or {}) if is_encoder else "text_config" in root:
        raise ValueError(f"{source} is already converted")
    if root.get("model_type") not in FAMILIES:
        raise ValueError(
            f"config.json: model_type {root.get('model_type')!r} is no VILA-1.5, NVILA, VILA-HD, VILA-U or PS3 "
            "checkpoint"
        )
    return root


def read_part_configs(source: Path, root: dict[str, Any]) -> list[dict[str, Any]]:
    """Configs of the three parts, from their folders or, if one has none, from the root config."""
    configs = []
    for part, key in zip(PART_PREFIXES, ORIGINAL_CONFIG_KEYS):
        path = source / part / "config.json"
        config = read_json(path) if path.is_file() else root.get(key)
        if not isinstance(config, dict):
            raise FileNotFoundError(f"{part}/config.json is missing")
        configs.append(config)
    return configs


def write_metadata(source: Path, root: dict[str, Any], target: Path, conv_mode: str, dtype: str) -> Any:
    """Everything but the weights: configs, tokenizer, chat template and the modules that `auto_map` reaches.

    Returns the config.
    """
    family = family_of(root)
    describe = {VILA_HD: describe_vila_hd, VILA_U: describe_vila_u}.get(family, describe_vila)
    config, processor, generation = describe(source, root, conv_mode)
    tokenizer, template = processor.tokenizer, str(processor.chat_template)
    config.architectures, config.dtype, config.auto_map = [family.model_class.__name__], dtype, family.auto_map
    processor.save_pretrained(target)
    config.save_pretrained(target)
    GenerationConfig(
        eos_token_id=stop_token_ids(template, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        max_new_tokens=DEFAULT_MAX_NEW_TOKENS,
        suppress_tokens=[config.image_token_id, config.video_token_id],
        **generation,
    ).save_pretrained(target)
    if (source / "llm" / "tokenizer.model").is_file():
        shutil.copy(source / "llm" / "tokenizer.model", target)  # not needed here; for the way back
    family.copy_code(target)
    return family.config_class.from_pretrained(target)


def describe_vila(source: Path, root: dict[str, Any], conv_mode: str) -> tuple[VilaConfig, VilaProcessor, dict]:
    """Config, processor and generation options of a VILA-1.5, NVILA or LongVILA checkpoint."""
    llm, tower, projector = read_part_configs(source, root)
    tokenizer = load_tokenizer(source / "llm")
    template = choose_chat_template(conv_mode, tokenizer, llm.get("model_type"), source, root)
    tokenizer.chat_template = template
    config = to_vila_config(
        root,
        llm,
        tower,
        projector,
        image_token_id=tokenizer.convert_tokens_to_ids(VilaProcessor.image_token),
        video_token_id=tokenizer.convert_tokens_to_ids(VilaProcessor.video_token),
        time_token_ids=time_token_ids(root, tokenizer, llm.get("vocab_size", 0)),
    )
    preprocessor = read_json(source / "vision_tower" / "preprocessor_config.json")
    processor = VilaProcessor(
        to_image_processor(root, preprocessor, config),
        tokenizer,
        chat_template=template,
        num_tile_tokens=config.num_tile_tokens,
        s2_output_scale=config.s2_resize_output_to_scale_idx,
        **to_processor_options(root),
    )
    return config, processor, {}


def describe_vila_hd(source: Path, root: dict[str, Any], conv_mode: str) -> tuple[VilaConfig, VilaProcessor, dict]:
    """The same of a VILA-HD checkpoint."""
    llm, tower, projector = read_part_configs(source, root)
    tokenizer = load_tokenizer(source / "llm")
    tokenizer.chat_template = choose_chat_template(conv_mode, tokenizer, llm.get("model_type"), source, root)
    weights = all_shapes(find_shards(source / "mm_projector"))
    config = to_vila_hd_config(root, llm, tower, projector, weights, tokenizer)
    preprocessor = read_json(source / "vision_tower" / "preprocessor_config.json")
    return config, to_vila_hd_processor(root, preprocessor, config, tokenizer), {}


def write_encoder_metadata(source: Path, root: dict[str, Any], target: Path, conv_mode: str, dtype: str) -> Any:
    """As `write_metadata`, of a bare PS3 encoder; it has no tokenizer and no chat."""
    config = to_ps3_config(root, all_shapes(find_shards(source)))
    config.architectures, config.dtype, config.auto_map = [PS3.model_class.__name__], dtype, PS3.auto_map
    to_ps3_image_processor(read_json(source / "preprocessor_config.json"), config).save_pretrained(target)
    config.save_pretrained(target)
    PS3.copy_code(target)
    return PS3.config_class.from_pretrained(target)


def all_shapes(shards: list[Shard]) -> dict[str, list[int]]:
    return {name: shape for shard in shards for name, shape in shard.shapes.items()}


def describe_vila_u(source: Path, root: dict[str, Any], conv_mode: str) -> tuple[VilaConfig, VilaProcessor, dict]:
    """The same of a VILA-U checkpoint."""
    llm, tower, projector = read_part_configs(source, root)
    tokenizer = load_tokenizer(source / "llm")
    template = choose_vila_u_template(conv_mode)
    tokenizer.chat_template = template
    config = to_vila_u_config(root, llm, tower, projector, source / "vision_tower", tokenizer)
    processor = to_vila_u_processor(root, config, tokenizer, template)
    return config, processor, {"drawing": drawing_options(config)}


def time_token_ids(root: dict[str, Any], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int] | None:
    """Ids of the time tokens: as the config lists them, else by their names; None where the model has no such tokens.

    A config may speak of tokens that were never added, or have no row in the embedding table: such a model can
    neither read nor write them.
    """
    tokens = [
        str(root.get("time_token_format") or "<t{t}>").format(t=time)
        for time in range(root.get("num_time_tokens") or 0)
    ]
    vocabulary = tokenizer.get_vocab()
    ids = root.get("time_token_ids") or [vocabulary.get(token, vocab_size) for token in tokens]
    return list(ids) if ids and max(ids) < vocab_size else None


def check_weights(family: Family, config: Any, shards: dict[str, list[Shard]]) -> None:
    """Compares names and shapes with the model, so that nothing is initialised at random when it is loaded.

    Raises:
        ValueError: naming the first tensor that is missing, too many or of another shape.
    """
    with torch.device("meta"):
        model = family.model_class(config)
        stored = {
            PART_PREFIXES.get(part, "") + name: torch.empty(shape)
            for part, files in shards.items()
            for shard in files
            for name, shape in shard.shapes.items()
        }
    found = {name: list(tensor.shape) for name, tensor in family.with_module_names(stored).items()}
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    ignored = re.compile("|".join([*(model._keys_to_ignore_on_load_unexpected or ()), r"position_ids$", r"inv_freq$"]))
    for name in sorted(expected.keys() | found.keys()):
        if name not in found and not (name == "lm_head.weight" and getattr(config, "tie_word_embeddings", False)):
            raise ValueError(f"the checkpoint lacks the tensor {name!r}")
        if name not in expected and not ignored.search(name):
            raise ValueError(f"the checkpoint has the tensor {name!r}, which its configs do not speak of")
        if name in found and found[name] != expected.get(name, found[name]):
            raise ValueError(f"the tensor {name!r} has the shape {found[name]}, its configs say {expected[name]}")


def place_files(staging: Path, target: Path) -> None:
    """Moves all staged files into `target`; a different file of the same name is saved in `original_files/` first."""
    # config.json last: it says that the folder is converted
    for file in sorted(staging.iterdir(), key=lambda file: (file.name == "config.json", file.name)):
        old = target / file.name
        if old.exists() and old.read_bytes() != file.read_bytes():
            backup = target / BACKUP_FOLDER / file.name
            backup.parent.mkdir(exist_ok=True)
            if not backup.exists():
                shutil.copy2(old, backup)
        if old.is_symlink():
            old.unlink()  # a link into the Hub cache: replace the link, leave the cached file alone
        shutil.copy2(file, old)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="vila-convert", description=__doc__.split("\n")[0])
    parser.add_argument(
        "source", metavar="SRC", help="original folder or Hub id; with --to-original a converted folder"
    )
    parser.add_argument("target", metavar="DST", nargs="?", help="new folder (default: name of SRC with -hf)")
    parser.add_argument("--conv-mode", choices=CONV_MODES, default="auto", help="chat template (default: %(default)s)")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--copy", action="store_true", help="write self-contained root shards instead of links")
    way.add_argument("--in-place", action="store_true", help="convert inside SRC; overwritten files are saved first")
    way.add_argument("--to-original", action="store_true", help="write the research layout from a converted folder")
    options = parser.parse_args(arguments)
    try:
        if options.to_original:
            if options.target is None or options.conv_mode != "auto":
                parser.error("--to-original needs DST and takes no --conv-mode")
            folder = to_original(options.source, options.target)
        else:
            folder = convert(
                options.source,
                options.target,
                conv_mode=options.conv_mode,
                copy=options.copy,
                in_place=options.in_place,
            )
    except (OSError, ValueError) as error:
        sys.exit(f"vila-convert: {error}")
    sys.stdout.write(f"{folder}\n")


if __name__ == "__main__":
    main()
