"""Fine-tuning by the command, and its presets."""

import importlib.util
import json
import math
import re
import sys

import pytest
import torch
from conftest import REPOSITORY
from training_rows import PICTURE, ROWS, TEXT_ROW, chat, load, text
from transformers import AutoModel, AutoProcessor, TrainingArguments
from vila.training_presets_vila import PRESETS, split_batch
from vila.training_vila import PARTS, VilaDataCollator


@pytest.fixture
def processor(lite):
    return AutoProcessor.from_pretrained(lite)


# ------------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def command():
    spec = importlib.util.spec_from_file_location("train_command", REPOSITORY / "examples" / "train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    PICTURE["image"].save(folder / "picture.png")
    on_disk = chat([{"type": "image", "path": "picture.png"}, text("Describe the image.")], "A cat.")
    file = folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in (on_disk, TEXT_ROW, on_disk, TEXT_ROW)) + "\n")
    return file


def run(command, lite, data, output, *options):
    fixed = ["--save_steps", "1", "--logging_steps", "1", "--disable_tqdm", "True", "--global_batch_size", "4"]
    command.main(["--model", str(lite), "--data", str(data), "--output", str(output), *fixed, *options])
    return json.loads((sorted(output.glob("checkpoint-*"))[-1] / "trainer_state.json").read_text())


def test_command_trains_resumes_and_saves_what_loads(command, lite, data, tmp_path):
    output, options = tmp_path / "out", ["--preset", "nvila-lite/sft", "--warmup_steps", "0", "--packing", "True"]
    state = run(command, lite, data, output, *options, "--learning_rate", "1e-2", "--max_steps", "2")
    assert state["global_step"] == 2
    # a third step that changes nothing: the result is what the first run ended with
    state = run(command, lite, data, output, *options, "--learning_rate", "0", "--max_steps", "3")
    assert state["global_step"] == 3
    losses = [entry["loss"] for entry in state["log_history"]]
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0]
    stopped, resumed = load(output / "checkpoint-2"), load(output)
    for name, weight in stopped.named_parameters():
        assert torch.equal(weight, resumed.get_parameter(name))
    with torch.no_grad():
        assert resumed.eval()(**VilaDataCollator(AutoProcessor.from_pretrained(output))(ROWS)).loss < losses[0]


def test_requests_are_left_out_of_a_vila_u_only(command, lite, vila_u_folder):
    options = command.parse(["--model", "m", "--data", "d", "--output", "o", "--caption_dropout", "0.25"])[0]
    collator = command.collator_for("vila_u", AutoProcessor.from_pretrained(vila_u_folder), options)
    assert collator.caption_dropout == 0.25
    with pytest.raises(ValueError, match="VILA-U only"):
        command.collator_for("vila", AutoProcessor.from_pretrained(lite), options)


def test_command_teaches_a_vila_u_to_draw(command, vila_u_folder, tmp_path):
    PICTURE["image"].save(tmp_path / "picture.png")
    drawn = chat([text("A snowy mountain.")], [{"type": "image", "path": str(tmp_path / "picture.png")}])
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in (drawn, TEXT_ROW, drawn, TEXT_ROW)) + "\n")
    output = tmp_path / "out_u"
    run(command, vila_u_folder, file, output, "--max_steps", "1", "--packing", "True", "--learning_rate", "1e-2")
    before, after = (load(folder).model.depth_transformer.head.weight for folder in (vila_u_folder, output))
    assert not torch.equal(before, after)
    assert AutoProcessor.from_pretrained(output)(text="A cat.", generation_mode="image")["negative_prompt_ids"]


def test_command_trains_adapters(command, lite, data, tmp_path):
    from peft import PeftModel

    run(
        command,
        lite,
        data,
        tmp_path / "out",
        "--preset",
        "nvila-lite/pretrain",
        "--lora",
        "--lora_r",
        "2",
        "--max_steps",
        "2",
    )
    adapted = PeftModel.from_pretrained(load(lite), tmp_path / "out")
    assert "multi_modal_projector" in adapted.peft_config["default"].modules_to_save
    old, new = load(lite).state_dict(), adapted.merge_and_unload().state_dict()
    changed = {name.split(".")[1] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"multi_modal_projector", "language_model"}


def test_command_line_overrides_the_preset(command, tmp_path):
    base = ["--model", "m", "--data", "d", "--output", str(tmp_path)]
    options, training = command.parse([*base, "--preset", "nvila/stage1.5"])
    assert (options.tuned, options.max_length) == (["vision_tower", "projector"], 8192)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 1024
    assert (training.learning_rate, training.max_grad_norm, training.warmup_steps) == (2e-5, 5.0, 0.03)
    assert training.output_dir == str(tmp_path) and training.bf16 and not training.remove_unused_columns
    given = ["--preset=nvila/stage1.5", "--max_length=99", "--tuned", "projector", "--learning_rate=1e-3"]
    options, training = command.parse([*base, *given, "--bf16", "False", "--per_device_train_batch_size", "2"])
    assert (options.tuned, options.max_length, training.learning_rate) == (["projector"], 99, 1e-3)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (2, 512)
    assert not training.bf16
    sizes = ["--per-device-train-batch-size", "3", "--gradient-accumulation-steps", "5"]
    _, training = command.parse([*base, "--preset", "nvila/sft", *sizes])
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (3, 5)
    _, training = command.parse([*base, "--preset", "vila1.5/sft"])
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (16, 2)


def test_command_divides_the_batch_by_the_processes(command, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    given = command.argparse.Namespace(
        global_batch_size=None, per_device_train_batch_size=None, gradient_accumulation_steps=None
    )
    sizes = command.batch_sizes(PRESETS["nvila-lite/sft"], given)
    assert sizes == {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 16}


def test_command_says_what_is_not_the_recipe(command, lite, processor, caplog):
    command.check_recipe(PRESETS["nvila-lite/sft"], load(lite).config, processor)
    assert not caplog.records
    command.check_recipe(PRESETS["nvila/sft"], load(lite).config, processor)
    assert "dynamic_s2" in caplog.text


def test_command_scales_positions_for_longer_rows(command, lite):
    config = load(lite).config
    limit = config.text_config.max_position_embeddings
    command.extend_context(config.text_config, limit)
    assert config.text_config.rope_parameters["rope_type"] == "default"
    command.extend_context(config.text_config, limit + 1)
    assert config.text_config.rope_parameters["factor"] == 2.0
    model = AutoModel.from_pretrained(lite, config=config)
    assert torch.equal(
        model.model.language_model.rotary_emb.inv_freq * 2, load(lite).model.language_model.rotary_emb.inv_freq
    )


@pytest.mark.parametrize("line", ["{", "[]", '{"message": []}', ""])
def test_command_names_the_broken_line(command, tmp_path, line):
    file = tmp_path / "rows.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"line 1|no rows"):
        command.read_rows(file)


def test_readme_snippet_runs(lite, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = (REPOSITORY / "README.md").read_text().split("\n## Fine-tune\n")[1].split("\n## ")[0]
    (snippet,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names = {"path": lite, "rows": ROWS}
    exec(snippet.replace("max_steps=10", "max_steps=1"), names)
    assert load(tmp_path / "tuned").num_parameters() == names["model"].num_parameters()
    assert not names["model"].model.vision_tower.training


# ---------------------------------------------------------------------------------------------------------- presets


def test_presets_name_what_exists(lite, processor):
    config = load(lite).config
    for preset in PRESETS.values():
        assert set(preset.tuned) <= set(PARTS)
        TrainingArguments("out", use_cpu=True, **preset.arguments())
        for name, _ in preset.expected:
            assert hasattr(config, name) or hasattr(processor.image_processor, name)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((2048, 128), (16, 1)),
        ((1024, 1), (16, 64)),
        ((6, 1), (6, 1)),
        ((34, 2), (1, 17)),
        ((1024, 8, 4), (4, 32)),
        ((64, 2, None, 8), (4, 8)),
    ],
)
def test_global_batch_is_divided_exactly(arguments, expected):
    assert split_batch(*arguments) == expected
    assert math.prod(expected) * arguments[1] == arguments[0]


@pytest.mark.parametrize("arguments", [(10, 3), (10, 1, 4), (10, 1, None, 4), (8, 1, 2, 2), (4, 1, 8), (0, 1)])
def test_global_batch_that_cannot_be_divided_is_refused(arguments):
    with pytest.raises(ValueError, match="global batch"):
        split_batch(*arguments)
