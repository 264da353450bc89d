"""Original folders in, loadable folders out, and back again; nothing is lost on the way."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import COMMITTED_GOLDENS, GoldenCase
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor
from vila.conversion_vila import convert, main, to_original
from vila.original_config_vila import to_vila_config
from vila.weight_names_vila import original_name

CASES = [GoldenCase(COMMITTED_GOLDENS / "vila" / name) for name in (
    "nvila_lite_image", "nvila_dynamic_s2_image", "vila15_image", "vila15_s2_image", "vila15_clip_image",
    "vila15_llama3_image", "vila15_intern_image",
)]  # fmt: skip
LITE = CASES[0]


@pytest.fixture
def source(tmp_path):
    """A copy of an original checkpoint that a test may damage."""
    return shutil.copytree(LITE.folder / "checkpoint", tmp_path / "original")


def digests(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def answer(folder, case=LITE):
    model = AutoModel.from_pretrained(folder, dtype="float32")
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor.apply_chat_template(
        case.chats[0], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return model.generate(**inputs, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :].tolist()


def test_conversion_links_weights_and_changes_nothing_in_the_source(source, tmp_path):
    before = digests(source)
    target = convert(source, tmp_path / "target")
    assert digests(source) == before
    index = json.loads((target / "model.safetensors.index.json").read_text())
    for file in set(index["weight_map"].values()):
        assert (target / file).is_symlink()
        assert os.path.samefile(target / file, source / file.replace("-", "/", 1))
    with safe_open(source / "llm" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) <= set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes
        for part in ("llm", "vision_tower", "mm_projector")
        for tensor in load_file(source / part / "model.safetensors").values()
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loading_is_complete(case, converted):
    _, info = AutoModel.from_pretrained(converted(case), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


def test_in_place_saves_what_it_overwrites_first(source):
    original_config = (source / "config.json").read_bytes()
    (source / "generation_config.json").write_text('{"precious": true}')
    before = digests(source)
    assert convert(source, in_place=True) == source
    assert (source / "original_files" / "config.json").read_bytes() == original_config
    assert json.loads((source / "original_files" / "generation_config.json").read_text()) == {"precious": True}
    after = digests(source)
    for name, digest in before.items():
        assert after[name] == digest or after[f"original_files/{name}"] == digest
    assert answer(source) == LITE.golden["greedy_ids"]
    with pytest.raises(ValueError, match="already converted"):
        convert(source, in_place=True)


def test_in_place_leaves_linked_cache_files_alone(source, tmp_path):
    """A Hub cache holds links to blobs: the link is replaced, the blob is not written through."""
    blob = tmp_path / "blob"
    (source / "config.json").rename(blob)
    (source / "config.json").symlink_to(blob)
    before = blob.read_bytes()
    convert(source, in_place=True)
    assert blob.read_bytes() == before


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_copy_is_self_contained_with_root_shards(case, tmp_path):
    target = convert(case.folder / "checkpoint", tmp_path / "copy", conv_mode=case.prompt["conv_mode"], copy=True)
    assert not any(entry.is_symlink() or entry.is_dir() for entry in target.iterdir())
    shards = sorted(path.name for path in target.glob("*.safetensors"))
    assert shards == [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    names = {name for shard in shards for name in load_file(target / shard)}
    assert all(name.startswith(("llm.", "vision_tower.vision_tower.", "mm_projector.")) for name in names)
    assert answer(target, case) == case.golden["greedy_ids"]


def test_sharded_parts_are_found_by_their_index(source, tmp_path):
    tensors = load_file(source / "llm" / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({name: tensors[name] for name in own}, source / "llm" / file)
    (source / "llm" / "model.safetensors").unlink()
    weight_map = {name: file for file, own in halves.items() for name in own}
    (source / "llm" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert answer(convert(source, tmp_path / "linked")) == LITE.golden["greedy_ids"]
    copied = convert(source, tmp_path / "copied", copy=True)
    assert answer(copied) == LITE.golden["greedy_ids"]
    back = to_original(copied, tmp_path / "back")
    assert answer(convert(back, tmp_path / "again")) == LITE.golden["greedy_ids"]
    (source / "llm" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        convert(source, tmp_path / "incomplete")
    assert not (tmp_path / "incomplete").exists()


@pytest.mark.parametrize("layout", ["linked", "copied", "saved", "saved_with_module_names"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_way_back_gives_the_original_weights_and_options(case, layout, tmp_path):
    mode = case.prompt["conv_mode"]
    folder = convert(case.folder / "checkpoint", tmp_path / "new", conv_mode=mode, copy=layout == "copied")
    if layout.startswith("saved"):
        model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        folder = tmp_path / "saved"
        model.save_pretrained(folder, save_original_format=layout == "saved")
        processor.save_pretrained(folder)
    if layout == "saved_with_module_names" and case.name == "vila15_intern_image":
        with pytest.raises(ValueError, match="save_original_format"):
            to_original(folder, tmp_path / "back")
        return
    back = to_original(folder, tmp_path / "back")

    used_layers = (
        json.loads((case.folder / "checkpoint/vision_tower/config.json").read_text())["num_hidden_layers"] - 1
    )
    for part in ("llm", "vision_tower", "mm_projector"):
        expected = load_file(case.folder / "checkpoint" / part / "model.safetensors")
        restored = load_file(back / part / "model.safetensors")
        assert set(restored) == set(expected)
        for name, tensor in expected.items():
            unused = f"layers.{used_layers}." in name or "post_layernorm" in name
            if part == "vision_tower" and unused and layout.startswith("saved"):
                assert restored[name].shape == tensor.shape
            else:
                assert torch.equal(restored[name], tensor), name
    assert answer(convert(back, tmp_path / "again", conv_mode=mode), case) == case.golden["greedy_ids"]


NOT_CARRIED = {"_name_or_path", "drop_path_rate", "model_dtype", "resume_path", "torch_dtype", "transformers_version",
               "use_flash_attn"}  # fmt: skip
TRAINING = {"tune_language_model", "tune_mm_projector", "tune_vision_tower", "mm_projector_lr", "vision_tower_lr"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_way_back_gives_the_original_config(case, converted, tmp_path):
    back = to_original(converted(case), tmp_path / "back")
    for file in ("config.json", "llm/config.json", "vision_tower/config.json", "mm_projector/config.json"):
        original = json.loads((case.folder / "checkpoint" / file).read_text())
        restored = json.loads((back / file).read_text())
        unused_scales = (
            {"s2_scales", "s2_max_split_size"} if not (original.get("s2") or original.get("dynamic_s2")) else set()
        )
        skipped = NOT_CARRIED | TRAINING | unused_scales | {"llm_cfg", "vision_tower_cfg", "mm_projector_cfg"}
        skipped |= {"model_max_length", "tokenizer_model_max_length", "tokenizer_padding_side"}
        for key, value in original.items():
            if key not in skipped:
                expected = "default" if key == "image_aspect_ratio" and value not in (
                    "resize", "pad", "dynamic", "dynamic_s2") else value  # fmt: skip
                assert restored.get(key) == expected, (file, key)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tokenizer_of_the_way_back_is_one_that_transformers_4_reads(case, converted, tmp_path):
    """Its classes are those of that time, and the template stands in the config and marks no generation."""
    folder = to_original(converted(case), tmp_path / "back") / "llm"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] in ("LlamaTokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast")
    assert "backend" not in config
    assert not isinstance(config.get("extra_special_tokens"), list)
    assert "messages" in config["chat_template"]
    assert "endgeneration" not in config["chat_template"]
    slow_files = {"LlamaTokenizer": {"tokenizer.model"}, "Qwen2Tokenizer": {"vocab.json", "merges.txt"}}
    for file in slow_files.get(config["tokenizer_class"], ()):
        assert (folder / file).read_bytes() == (case.folder / "checkpoint" / "llm" / file).read_bytes() or (
            json.loads((folder / file).read_text())
            == json.loads((case.folder / "checkpoint" / "llm" / file).read_text())
            if file.endswith(".json")
            else (folder / file).read_text().split() == (case.folder / "checkpoint" / "llm" / file).read_text().split()
        )
    for part in ("llm", "vision_tower", "mm_projector"):
        assert json.loads((folder.parent / part / "config.json").read_text())["torch_dtype"] == "float32"


def test_options_of_the_processor_survive_the_way_back(source, tmp_path):
    processor = AutoProcessor.from_pretrained(convert(source, tmp_path / "new"))
    encoder = {
        "video_pool_sizes": [[2, 1, 1]],
        "video_as_images": False,
        "video_sep_tokens": ">",
        "image_end_tokens": None,
    }
    options = {**encoder, "num_video_frames": 5, "video_fps": 2.0, "video_max_tiles": 3, "num_time_tokens": 9}
    for name, value in options.items():
        setattr(processor, name, value)
    processor.save_pretrained(tmp_path / "new")
    to_original(tmp_path / "new", tmp_path / "back")
    again = AutoProcessor.from_pretrained(convert(tmp_path / "back", tmp_path / "again"))
    assert {name: getattr(again, name) for name in options} == options


def test_default_target_is_named_after_the_source(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert convert(source).name == "original-hf"
    snapshot = shutil.copytree(source, tmp_path / "0123abcd")
    monkeypatch.setattr("vila.conversion_vila.snapshot_download", lambda *args, **kwargs: str(snapshot))
    assert convert("Organisation/NVILA-8B").name == "NVILA-8B-hf"
    with pytest.raises(ValueError, match="--in-place needs a folder"):
        convert("Organisation/NVILA-8B", in_place=True)


CLIP_CASE = GoldenCase(COMMITTED_GOLDENS / "vila" / "vila15_clip_image")


@pytest.mark.parametrize(
    ("change", "removed"),
    [({"size": 84, "crop_size": 84}, ()), ({}, ("do_center_crop",)), ({}, ("size", "crop_size", "image_mean"))],
)
def test_clip_preprocessors_of_any_age_mean_the_same(change, removed, tmp_path):
    source = shutil.copytree(CLIP_CASE.folder / "checkpoint", tmp_path / "original")
    path = source / "vision_tower" / "preprocessor_config.json"
    content = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in removed}))
    target = convert(source, tmp_path / "target", conv_mode="vicuna_v1")
    assert answer(target, CLIP_CASE) == CLIP_CASE.golden["greedy_ids"]


def test_sub_folder_model_is_entered(source, tmp_path):
    (tmp_path / "repository").mkdir()
    source.rename(tmp_path / "repository" / "model")
    assert answer(convert(tmp_path / "repository", tmp_path / "target")) == LITE.golden["greedy_ids"]


def test_old_configs_without_new_keys_load(source, tmp_path):
    """VILA-1.5 folders lack most keys that NVILA introduced; unknown keys of later versions are kept."""
    config = json.loads((source / "config.json").read_text())
    needed = ("model_type", "image_aspect_ratio", "mm_vision_select_layer", "mm_vision_select_feature")
    old = {key: config[key] for key in needed} | {"a_future_option": {"x": 1}}
    (source / "config.json").write_text(json.dumps(old))
    target = convert(source, tmp_path / "target")
    assert answer(target) == LITE.golden["greedy_ids"]
    back = to_original(target, tmp_path / "back")
    assert json.loads((back / "config.json").read_text())["a_future_option"] == {"x": 1}


def test_part_configs_may_stand_in_the_root_config_alone(source, tmp_path):
    for part in ("llm", "vision_tower", "mm_projector"):
        (source / part / "config.json").unlink()
    assert answer(convert(source, tmp_path / "target")) == LITE.golden["greedy_ids"]


def damage_config(key, value):
    def damage(source):
        config = json.loads((source / "config.json").read_text())
        config[key] = value
        (source / "config.json").write_text(json.dumps(config))

    return damage


def damage_part(part, key, value):
    def damage(source):
        path = source / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    return damage


def only_pickle(source):
    (source / "llm" / "model.safetensors").rename(source / "llm" / "pytorch_model.bin")


def truncated_weights(source):
    path = source / "mm_projector" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def damage_preprocessor(**options):
    def damage(source):
        path = source / "vision_tower" / "preprocessor_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **options}))

    return damage


def change_tensor(part, name, change):
    def damage(source):
        path = source / part / "model.safetensors"
        tensors = load_file(path)
        change(tensors, name)
        save_file(tensors, path, metadata={"format": "pt"})

    return damage


def broken_json(source):
    (source / "llm" / "config.json").write_text("{")


DAMAGES = {
    "broken_json": (broken_json, "llm/config.json"),
    "negative_tiles": (damage_config("max_tiles", -3), "max_tiles"),
    "tiles_reversed": (damage_config("min_tiles", 13), "min_tiles"),
    "text_for_a_flag": (damage_config("dynamic_s2", "false"), "dynamic_s2"),
    "scales_that_do_not_fit": (damage_config("s2", True), "s2_scales"),
    "mode_without_scales": (damage_config("image_aspect_ratio", "dynamic_s2"), "image_aspect_ratio"),
    "encoder_is_no_json": (damage_config("image_encoder", "{"), "image_encoder"),
    "encoder_is_a_list": (damage_config("video_encoder", [1]), "video_encoder"),
    "picture_size": (damage_preprocessor(size={"height": 84, "width": 84}), "70x70"),
    "no_deviation": (damage_preprocessor(image_std=[0.0, 0.0, 0.0]), "image_std"),
    "missing_tensor": (change_tensor("mm_projector", "layers.1.weight", dict.pop), "multi_modal_projector.layers.1"),
    "extra_tensor": (change_tensor("llm", "model.layers.7.x", lambda t, n: t.update({n: torch.ones(1)})), "layers.7"),
    "other_shape": (
        change_tensor("llm", "lm_head.weight", lambda t, n: t.update({n: torch.ones(392, 48)})),
        "lm_head.*392",
    ),
    "no_root_config": (lambda source: (source / "config.json").unlink(), "config.json"),
    "no_projector": (lambda source: shutil.rmtree(source / "mm_projector"), "mm_projector"),
    "pickle_only": (only_pickle, "pickle"),
    "truncated_weights": (truncated_weights, "mm_projector/model.safetensors"),
    "other_model": (damage_config("model_type", "qwen2_vl"), "qwen2_vl"),
    "bad_feature": (damage_config("mm_vision_select_feature", "cls"), "mm_vision_select_feature"),
    "layer_outside": (damage_config("mm_vision_select_layer", -9), "vision_feature_layer"),
    "layer_is_text": (damage_config("mm_vision_select_layer", "last"), "vision_feature_layer"),
    "unknown_tower": (damage_part("vision_tower", "model_type", "dino"), "dino"),
    "unknown_language_model": (damage_part("llm", "model_type", "gpt5"), "gpt5"),
    "unknown_projector": (damage_part("mm_projector", "mm_projector_type", "resampler"), "resampler"),
    "negative_size": (damage_part("llm", "hidden_size", -48), "hidden_size"),
    "nan_size": (damage_part("vision_tower", "hidden_size", float("nan")), "hidden_size"),
    "text_for_a_number": (damage_part("llm", "hidden_size", "big"), "hidden_size"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_broken_checkpoints_are_refused_by_name_and_leave_nothing(damage, source, tmp_path):
    break_it, named = DAMAGES[damage]
    break_it(source)
    before = digests(source)
    with pytest.raises((ValueError, FileNotFoundError), match=named):
        convert(source, tmp_path / "target")
    with pytest.raises((ValueError, FileNotFoundError), match=named):
        convert(source, in_place=True)
    assert not (tmp_path / "target").exists()
    assert digests(source) == before


def test_an_existing_target_is_not_touched(source, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        convert(source, target)
    assert [entry.name for entry in target.iterdir()] == ["notes.txt"]


def test_missing_shard_at_load_time_is_an_error(source, tmp_path):
    target = convert(source, tmp_path / "target")
    (source / "mm_projector" / "model.safetensors").unlink()
    with pytest.raises(OSError, match="mm_projector"):
        AutoModel.from_pretrained(target)


def test_original_config_names_the_way_out():
    """Somebody who loads an original folder directly is told what to do."""
    from vila import VilaConfig

    with pytest.raises(ValueError, match="vila-convert"):
        VilaConfig(llm_cfg={}, vision_tower_cfg={}, mm_projector_cfg={})


def test_translation_needs_only_what_has_no_default():
    llm = json.loads((LITE.folder / "checkpoint/llm/config.json").read_text())
    tower = json.loads((LITE.folder / "checkpoint/vision_tower/config.json").read_text())
    projector = {"mm_projector_type": "mlp_downsample"}
    config = to_vila_config({}, llm, tower, projector, image_token_id=390, video_token_id=391)
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "full")
    assert not config.s2
    assert not config.dynamic_s2


def test_names_of_no_part_are_refused():
    with pytest.raises(KeyError):
        original_name("optimizer.state")


def test_command_line_converts_there_and_back(source, tmp_path):
    run = [sys.executable, "-m", "vila.conversion_vila"]
    there = subprocess.run([*run, source, tmp_path / "new"], capture_output=True, text=True)
    assert there.returncode == 0, there.stderr
    assert there.stdout.strip() == str(tmp_path / "new")
    back = subprocess.run([*run, "--to-original", tmp_path / "new", tmp_path / "back"], capture_output=True, text=True)
    assert back.returncode == 0, back.stderr
    assert (tmp_path / "back" / "llm" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "arguments",
    [["missing_folder"], ["--copy", "--in-place", "x"], ["--to-original", "x"], ["x", "--conv-mode", "zz"]],
)
def test_command_line_errors_are_one_sentence(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code not in (0, None)
    assert "Traceback" not in capsys.readouterr().err
