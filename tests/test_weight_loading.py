"""Loading: all weights that the model needs or an error, from safetensors only, whatever is wrong with the folder."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
import vila
from conftest import COMMITTED_GOLDENS
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from vila import VilaForConditionalGeneration, VilaModel
from vila.conversion_vila import convert

SOURCE = COMMITTED_GOLDENS / "vila" / "nvila_lite_image" / "checkpoint"


def change_shard(folder, name, change):
    """Applies `change(tensors)` to the file that holds a weight, and writes the index of what is there."""
    index_file = folder / "model.safetensors.index.json"
    file = folder / json.loads(index_file.read_text())["weight_map"][name]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    weight_map = {key: path.name for path in folder.glob("*.safetensors") for key in load_file(path)}
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change_file(name, change):
    def damage(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return damage


def to_pickle(folder):
    weights = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def only_one_shard_is_cut(folder):
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:40])


BIAS, HEAD = "mm_projector.layers.1.bias", "llm.lm_head.weight"
TOWER = "vision_tower.vision_tower.vision_model.embeddings.patch_embedding.bias"
BROKEN_FOLDERS = {
    "missing tensor": (
        lambda folder: change_shard(folder, BIAS, lambda tensors: tensors.pop(BIAS)),
        r"lacks 1 weight.*multi_modal_projector\.layers\.1\.bias'",
    ),
    "missing tower": (
        lambda folder: change_shard(folder, TOWER, dict.clear),
        r"lacks \d\d weight.*'model.vision_tower",
    ),
    "no head": (lambda folder: change_shard(folder, HEAD, lambda tensors: tensors.pop(HEAD)), "lm_head.weight"),
    "other shape": (
        lambda folder: change_shard(folder, HEAD, lambda tensors: tensors.update({HEAD: torch.ones(3, 48)})),
        r"'lm_head.weight' has the shape \[3, 48\], its config says \[389, 48\]",
    ),
    "larger config": (
        change_file("config.json", lambda config: config["text_config"].update(vocab_size=2**24)),
        r"has the shape \[389, 48\], its config says \[16777216, 48\]",
    ),
    "enormous config": (
        change_file("config.json", lambda config: config["text_config"].update(num_hidden_layers=10**9)),
        "text_config.num_hidden_layers",
    ),
    "pickle only": (to_pickle, "pickle"),
    "truncated shard": (only_one_shard_is_cut, "damaged"),
}


@pytest.mark.parametrize(
    ("kind", "auto_class"),
    [
        *((kind, AutoModel) for kind in BROKEN_FOLDERS),
        *((kind, VilaModel) for kind in ("missing tensor", "larger config", "pickle only", "truncated shard")),
    ],
)
def test_a_checkpoint_that_is_not_complete_is_never_filled_with_random_weights(kind, auto_class, tmp_path):
    folder = convert(SOURCE, tmp_path / kind.replace(" ", "_"), copy=True)
    break_it, message = BROKEN_FOLDERS[kind]
    break_it(folder)
    with pytest.raises(ValueError, match=message):
        auto_class.from_pretrained(folder)


def test_no_pickle_is_read_even_on_demand(tmp_path):
    """Neither where safetensors are there, nor where they are not."""
    folder = convert(SOURCE, tmp_path / "pickled", copy=True)
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert AutoModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="safetensors files only"):
        AutoModel.from_pretrained(folder, use_safetensors=False)


def test_no_module_reads_pickles():
    forbidden = re.compile(r"torch\.load\((?!.*weights_only=True)|import pickle|pickle\.load|np\.load\(|import joblib")
    for path in Path(vila.__file__).parent.glob("*.py"):
        assert not forbidden.search(path.read_text()), path.name


def test_weights_without_a_place_are_reported_and_left_out(tmp_path, caplog):
    folder = convert(SOURCE, tmp_path / "more", copy=True)
    name = "mm_projector.layers.99.weight"
    change_shard(folder, BIAS, lambda tensors: tensors.update({name: torch.ones(2)}))
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        AutoModel.from_pretrained(folder)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "model.multi_modal_projector.layers.99.weight" in caplog.text and "UNEXPECTED" in caplog.text


def test_weights_of_another_shape_are_made_up_only_on_demand(tmp_path):
    folder = convert(SOURCE, tmp_path / "resized", copy=True)
    change_shard(folder, HEAD, lambda tensors: tensors.update({HEAD: torch.ones(3, 48)}))
    loaded = VilaForConditionalGeneration.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert loaded.lm_head.weight.shape == (389, 48)
    with pytest.raises(ValueError, match="lm_head"):
        AutoModel.from_pretrained(folder)
