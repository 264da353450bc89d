"""A folder on disk -> exactly the files that its repository on the Hub holds, and a proof that they load.

- Weights become root shards, because serving engines read no sub-folders; shards at the root are taken as they are.
- The modules are the installed package's own, those that `auto_map` reaches: no other code is uploaded, none is run.
- Nothing is taken that is not on the list, is a pickle, or lies outside of the folder.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from .conversion_vila import convert
from .families_vila import FAMILIES, PS3, Family, family_of, remote_name
from .tokenizer_files_vila import read_json
from .weight_files_vila import INDEX, Shard, copy_to_root, find_shards
from .weight_names_vila import PART_PREFIXES

CARD = "README.md"
HANDLER = "handler.py"
# as it is called where "LICENSE" is that of the weights
CODE_LICENCE = "LICENSE-CODE"
# what Inference Endpoints install beside their own transformers
REQUIREMENTS = "requirements.txt"
REQUIREMENTS_TEXT = "transformers>=5.23\nav\n"
METADATA = {
    "config.json": "config of the model",
    "generation_config.json": "defaults of generate()",
    "processor_config.json": "config of the processor",
    "preprocessor_config.json": "config of the image processor",
    "chat_template.jinja": "chat template",
    "tokenizer.json": "tokenizer",
    "tokenizer_config.json": "tokenizer",
    "special_tokens_map.json": "tokenizer",
    "added_tokens.json": "tokenizer",
    "vocab.json": "tokenizer",
    "merges.txt": "tokenizer",
    "tokenizer.model": "tokenizer of the original, for the way back",
    "quantization_report.json": "how it was quantised",
    "LICENSE*": "licence",
    "NOTICE*": "licence",
    "USE_POLICY*": "licence",
}
NEEDED = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib", ".msgpack", ".h5")
CHECK_TOKENS = 8


class StagedFile(NamedTuple):
    """One file of the repository: its name there, the file that is read, and why it belongs there."""

    name: str
    path: Path
    reason: str

    @property
    def size(self) -> int:
        return self.path.stat().st_size


class Staged(NamedTuple):
    """A folder that looks as the repository will.

    folder: the files under their names; large weights are links to where they lie.
    files: the same with reasons, except the model card.
    left_out: entry of the source -> why it is not taken.
    shards: the weight files.
    """

    folder: Path
    files: list[StagedFile]
    left_out: dict[str, str]
    family: Family
    shards: list[Shard]


def stage(source: str | Path, staging: Path) -> Staged:
    """Collects what belongs into the repository of a converted, fine-tuned or quantised folder.

    Args:
        source: the folder. An original one in the research layout is converted first.
        staging: an empty folder, which gets small files as copies, and weights as links where they are root shards
            already, else rewritten.

    Raises:
        ValueError, FileNotFoundError: if it is no complete checkpoint of this package, or a file to be taken is a
            link out of the folder; the message names it.
        OSError: if the disk has no room for rewritten weights.
    """
    folder = Path(source)
    root = check_source(folder)
    if "text_config" not in root:
        check_original_links(folder)
        check_room(sum(file.stat().st_size for file in folder.rglob("*.safetensors")), staging)
        converted = staging / "converted"
        convert(folder, converted, copy=True)
        for file in converted.iterdir():
            file.rename(staging / file.name)
        converted.rmdir()
        staged = stage_files(staging, staging)
        return staged._replace(left_out=describe_left_out(folder, set(), staged))
    return stage_files(folder, staging)


def check_source(folder: Path) -> dict[str, Any]:
    """The root config of a folder that can be uploaded."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter, which a stranger cannot load alone: merge it "
            "(vila.lora_vila.merge_lora, then save_pretrained) and upload the result"
        )
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json")
    root = read_json(folder / "config.json")
    if root.get("model_type") not in FAMILIES:
        raise ValueError(f"{folder} holds a model of the type {root.get('model_type')!r}, no VILA checkpoint")
    if family_of(root) is PS3:
        raise ValueError(f"{folder} holds an encoder without a language model: upload it with push_to_hub")
    return root


def stage_files(folder: Path, staging: Path) -> Staged:
    family = family_of(read_json(folder / "config.json"))
    check_index(folder)
    shards = find_shards(folder)  # refuses pickles and what is missing, before anything is written
    check_links(folder, shards)
    reasons = {}
    for file, reason in listed_files(folder):
        if file.parent != staging:
            shutil.copyfile(inside(folder, file), staging / file.name)
        reasons[file.name] = reason
    if missing := [name for name in NEEDED if name not in reasons]:
        raise FileNotFoundError(f"{folder} has no {missing[0]}")
    family.copy_code(staging)
    use_own_code(staging, family)
    reasons |= {file.name: "module that auto_map reaches" for file in staging.glob("*.py")}
    shutil.copy(Path(__file__).with_name(HANDLER), staging)
    shutil.copy(Path(__file__).with_name("LICENSE"), staging / CODE_LICENCE)
    (staging / REQUIREMENTS).write_text(REQUIREMENTS_TEXT, encoding="utf-8")
    reasons |= {HANDLER: "entry of Inference Endpoints", REQUIREMENTS: "what they install"}
    reasons[CODE_LICENCE] = "licence of the modules"
    stage_weights(folder, shards, staging)
    staged_shards = find_shards(staging)
    reasons |= {shard.path.name: "weights" for shard in staged_shards}
    if (staging / INDEX).is_file():
        reasons[INDEX] = "which weight lies in which file"
    files = [StagedFile(name, (staging / name).resolve(), reasons[name]) for name in sorted(reasons)]
    staged = Staged(staging, files, {}, family, staged_shards)
    return staged._replace(left_out=describe_left_out(folder, {shard.path.name for shard in shards}, staged))


def listed_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """The folder's small files that are on the list, with reasons."""
    for file in sorted(folder.iterdir()):
        for pattern, reason in METADATA.items():
            if fnmatchcase(file.name, pattern) and (file.is_file() or file.is_symlink()):
                yield file, reason
                break


def inside(folder: Path, file: Path) -> Path:
    """The real file; a snapshot of the Hub's cache may link into its repository's blobs.

    Raises:
        ValueError: if it is a link out of the folder.
    """
    home = folder.resolve()
    home = home.parents[1] if home.parent.name == "snapshots" else home
    real = file.resolve()
    if not real.is_relative_to(home):
        raise ValueError(f"{file.name} is a link out of {folder}: put the file itself there, or remove it")
    if not real.exists():
        raise FileNotFoundError(f"{file.name} is a link that leads nowhere")
    return real


def check_original_links(folder: Path) -> None:
    """Refuses an original whose files lead out of it; weights may, which are read as such and rewritten."""
    for file in sorted(folder.rglob("*")):
        if file.is_symlink() and file.suffix != ".safetensors":
            inside(folder, file)


def part_of(folder: Path, shard: Shard) -> str:
    """The part of the original that a shard holds, in its sub-folder or linked beside the others; "" at the root."""
    for part in PART_PREFIXES:
        if shard.path.parent == folder / part or is_conversion_link(folder, shard, part):
            return part
    return ""


def is_conversion_link(folder: Path, shard: Shard, part: str) -> bool:
    """Whether it is a link as `vila-convert` makes them, to weights that stayed where they were."""
    return shard.path.parent == folder and shard.path.name.startswith(f"{part}-")


def check_index(folder: Path) -> None:
    if (folder / INDEX).is_file():
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f"{INDEX} does not say which weight lies in which file")


def check_links(folder: Path, shards: list[Shard]) -> None:
    for shard in shards:
        part = part_of(folder, shard)
        if not part and shard.path.parent != folder:
            raise ValueError(f"{INDEX} names {shard.path.name!r} in a folder that is no part of a VILA")
        if not part or not is_conversion_link(folder, shard, part):
            inside(folder, shard.path)


def stage_weights(folder: Path, shards: list[Shard], staging: Path) -> None:
    """Root shards in `staging`: links to those that there are, or all of them rewritten one at a time."""
    if folder == staging:
        return
    parts: dict[str, list[Shard]] = {}
    for shard in indexed(folder, shards):
        parts.setdefault(part_of(folder, shard), []).append(shard)
    if parts.keys() == {""}:
        for shard in shards:
            os.symlink(inside(folder, shard.path), staging / shard.path.name)
        if (folder / INDEX).is_file():
            shutil.copyfile(inside(folder, folder / INDEX), staging / INDEX)
        return
    check_room(sum(shard.num_bytes for shard in shards), staging)
    copy_to_root(parts, staging)


def check_room(needed: int, staging: Path) -> None:
    free = shutil.disk_usage(staging).free
    if needed > free:
        raise OSError(
            f"the weights have to be rewritten as root shards: {needed / 1e9:.1f} GB, but {staging.parent} has "
            f"{free / 1e9:.1f} GB left"
        )


def indexed(folder: Path, shards: list[Shard]) -> list[Shard]:
    """The same files with the tensors that the index names: a conversion leaves out what the model does not use."""
    if not (folder / INDEX).is_file():
        return shards
    names = read_json(folder / INDEX)["weight_map"]
    return [
        shard._replace(shapes={name: shape for name, shape in shard.shapes.items() if name in names})
        for shard in shards
    ]


def use_own_code(staging: Path, family: Family) -> None:
    """Makes every `auto_map` name the modules beside it: one that was loaded from the Hub names another repository.

    Raises:
        ValueError: if one names a class that is not there.
    """
    processor = {"AutoProcessor": remote_name(family.processor_class)}
    entries = {"config.json": family.auto_map, "processor_config.json": processor}
    for file in sorted(staging.glob("*config.json")):
        content = read_json(file)
        before = json.dumps(content)
        for auto_map in auto_maps(content):
            for key, names in auto_map.items():
                auto_map[key] = own_names(names)
        if file.name in entries:
            content["auto_map"] = {**content.get("auto_map", {}), **entries[file.name]}
            content.pop("_name_or_path", None)  # of the machine that saved it
        for auto_map in auto_maps(content):
            for name in flat(auto_map.values()):
                if not (staging / f"{name.split('.')[0]}.py").is_file():
                    raise ValueError(f"{file.name}: auto_map names {name!r}, which is no class of this package")
        if json.dumps(content) != before:
            file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def auto_maps(content: Any) -> Iterator[dict[str, Any]]:
    """All `auto_map`s of a config, those of its sections included."""
    if isinstance(content, dict):
        if isinstance(content.get("auto_map"), dict):
            yield content["auto_map"]
        for value in content.values():
            yield from auto_maps(value)


def own_names(names: Any) -> Any:
    """`owner/repo--module.Class` -> `module.Class`, in lists too."""
    if isinstance(names, str):
        return names.rsplit("--", 1)[-1]
    return [own_names(name) for name in names] if isinstance(names, (list, tuple)) else names


def flat(values: Any) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from flat(value)


def describe_left_out(folder: Path, weights: set[str], staged: Staged) -> dict[str, str]:
    """Every entry of the folder that is not taken -> why."""
    taken = {file.name for file in staged.files} | weights | {CARD}
    return {
        entry.name + "/" * entry.is_dir(): reason_left_out(entry)
        for entry in sorted(folder.iterdir())
        if entry.name not in taken
    }


def reason_left_out(entry: Path) -> str:
    if entry.name in PART_PREFIXES:
        return "what is needed of it is rewritten at the root"
    if entry.is_dir():
        return "a folder: what engines read lies at the root"
    if entry.suffix.lower() in PICKLES:
        return "may hold a pickle, which can run any code"
    if entry.suffix == ".py":
        return "no module that auto_map reaches"
    if entry.suffix == ".safetensors":
        return "weights that the index does not name"
    return "not on the list"


# The package must not help: only the code in the folder may be used. Progress bars would hide the error's last line.
CHECK = """
import json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "vila" or name.startswith("vila."):
            raise ImportError("only the code beside the weights may be used")
sys.meta_path.insert(0, Refuse())
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
from transformers.utils.logging import disable_progress_bar
disable_progress_bar()
folder, device, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
model, info = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="auto", output_loading_info=True)
for problem in ("missing_keys", "unexpected_keys"):
    if info[problem]:
        raise ValueError(f"{problem.replace('_', ' ')} in the weights: {sorted(info[problem])[:3]}")
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
picture = Image.linear_gradient("L").convert("RGB")
content = [{"type": "image", "image": picture}, {"type": "text", "text": "Describe the picture."}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
).to(device)
ids = model.to(device).eval().generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
new = ids[0, inputs["input_ids"].shape[1]:]
if len(new) != tokens:
    raise ValueError(f"{len(new)} tokens were generated, not {tokens}")
sys.stdout.write("\\n" + json.dumps({"answer": processor.decode(new), "model": type(model).__name__}) + "\\n")
"""


def check_loads(folder: Path, device: str = "cpu") -> str:
    """Loads a staged folder as a stranger would, in a fresh process, and answers about a drawn picture.

    Neither this package nor the network nor a token is there; modules are cached in a folder of their own.

    Returns:
        The answer, `CHECK_TOKENS` tokens long.

    Raises:
        ValueError: if it does not load or generate; with the last line of the error.
    """
    with tempfile.TemporaryDirectory() as modules:
        hidden = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
        result = subprocess.run(
            [sys.executable, "-c", CHECK, str(folder.resolve()), device, str(CHECK_TOKENS)],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=environment,
            cwd=modules,  # the first folder that modules are looked for in
        )
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"the process ended with {result.returncode}"]
        raise ValueError(f"what would be uploaded does not load: {lines[-1]}")
    return json.loads(result.stdout.strip().splitlines()[-1])["answer"]


__all__ = ["CARD", "Staged", "StagedFile", "check_loads", "stage"]
