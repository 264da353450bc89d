"""Fine-tuning: batches with labels, losses, freezing, distributed steps, Trainer, PEFT and the command."""

import importlib.util
import json
import math
import os
import re
import socket
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import COMMITTED_GOLDENS, REPOSITORY
from PIL import Image
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments
from vila import training_vila
from vila.loss_vila import soft_time_loss
from vila.training_presets_vila import PRESETS, split_batch
from vila.training_vila import (
    LORA_TARGETS,
    PARTS,
    VilaDataCollator,
    parts_of,
    resize_position_embeddings,
    set_vision_resolution,
    train_only,
)

LITE = "nvila_lite_image"
PICTURE = {"type": "image", "image": Image.effect_noise((90, 60), 80).convert("RGB")}


def chat(*turns, system=None):
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns)]
    return {"messages": ([] if system is None else [{"role": "system", "content": system}]) + messages}


def text(content):
    return {"type": "text", "text": content}


TEXT_ROW = chat("What is the number?", "42")
PICTURE_ROW = chat([PICTURE, text("Describe the image.")], "The cat stands on the table.", "And?", "A dog.")
TWO_PICTURES_ROW = chat([PICTURE], "A cat.", [PICTURE, text("And this?")], "A dog.")
ROWS = [PICTURE_ROW, TEXT_ROW]


@pytest.fixture
def lite(converted):
    """Folder of a tiny NVILA-Lite."""
    return converted(LITE)


@pytest.fixture
def processor(lite):
    return AutoProcessor.from_pretrained(lite)


def load(folder, **options):
    return AutoModel.from_pretrained(folder, dtype="float32", **options)


def kept(labels):
    return labels[labels != -100].tolist()


def learned_text(processor, row):
    return processor.tokenizer.decode(kept(row["labels"]))


# ---------------------------------------------------------------------------------------------------------- batches


def test_labels_are_the_assistants_text_and_its_end(processor):
    row = VilaDataCollator(processor).encode_row(PICTURE_ROW)
    assert learned_text(processor, row) == "The cat stands on the table.<|im_end|>A dog.<|im_end|>"
    assert (row["labels"][row["input_ids"] == processor.image_token_id] == -100).all()
    both = row["labels"] != -100
    assert torch.equal(row["labels"][both], row["input_ids"][both])


def test_picture_in_an_assistants_turn_is_no_label(processor):
    row = VilaDataCollator(processor).encode_row(chat("Draw.", [text("Here: "), PICTURE, text(" done")]))
    assert learned_text(processor, row).replace("\n", "").startswith("Here: ")
    assert processor.image_token_id not in kept(row["labels"])


def test_padding_is_on_the_right_and_ignored(processor):
    batch = VilaDataCollator(processor, pad_to_multiple_of=16)(ROWS)
    row = VilaDataCollator(processor).encode_row(TEXT_ROW)
    length = len(row["input_ids"])
    assert batch["input_ids"].shape[1] % 16 == 0
    assert batch["input_ids"][1, :length].equal(row["input_ids"])
    assert batch["attention_mask"][1].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
    assert (batch["labels"][1, length:] == -100).all()
    assert (batch["input_ids"][1, length:] == processor.tokenizer.pad_token_id).all()


def test_every_picture_is_tiled_unless_told_otherwise(processor):
    tiled = VilaDataCollator(processor)([TWO_PICTURES_ROW])
    single = VilaDataCollator(processor, processor_kwargs={"tile_multiple_images": False})([TWO_PICTURES_ROW])
    assert len(tiled["pixel_values"]) > 2 == len(single["pixel_values"])
    assert len(tiled["image_grid_thw"]) == len(single["image_grid_thw"]) == 2


def test_pixels_of_all_rows_follow_each_other(processor):
    collate = VilaDataCollator(processor)
    rows = [collate.encode_row(row) for row in (PICTURE_ROW, TWO_PICTURES_ROW)]
    batch = collate([PICTURE_ROW, TEXT_ROW, TWO_PICTURES_ROW])
    assert batch["pixel_values"].equal(torch.cat([row["pixel_values"] for row in rows]))
    assert len(batch["image_grid_thw"]) == 3
    assert "pixel_values" not in collate([TEXT_ROW])


def test_packed_batch_is_one_row_without_mask(processor):
    collate = VilaDataCollator(processor, packing=True)
    rows = [collate.encode_row(row) for row in ROWS]
    batch = collate(ROWS)
    assert "attention_mask" not in batch
    assert batch["input_ids"][0].equal(torch.cat([row["input_ids"] for row in rows]))
    assert batch["position_ids"][0].tolist() == [i for row in rows for i in range(len(row["input_ids"]))]


def test_first_label_of_a_packed_row_is_ignored(processor, monkeypatch):
    collate = VilaDataCollator(processor, packing=True)
    row = {"input_ids": torch.arange(1, 5), "labels": torch.arange(1, 5)}
    assert collate._pack([row, row])["labels"].tolist() == [[-100, 2, 3, 4, -100, 2, 3, 4]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_equal_single_rows(lite, processor, attention):
    model = load(lite, attn_implementation=attention).train()
    packed = VilaDataCollator(processor, packing=True)([PICTURE_ROW, TEXT_ROW, TWO_PICTURES_ROW])
    with torch.no_grad():
        logits = model(**packed).logits[0]
        alone = []
        for row in (PICTURE_ROW, TEXT_ROW, TWO_PICTURES_ROW):
            batch = VilaDataCollator(processor)([row])
            batch.pop("attention_mask")
            alone.append(model(**batch).logits[0])
    torch.testing.assert_close(logits, torch.cat(alone), atol=1e-5, rtol=0)


def test_packed_rows_are_apart_in_inference_too(lite, processor):
    """There transformers makes a cache by default, beside which it sees no packing."""
    model = load(lite).eval()
    packed = VilaDataCollator(processor, packing=True)([TEXT_ROW, TEXT_ROW])
    with torch.no_grad():
        first, second = model.model(packed["input_ids"], position_ids=packed["position_ids"])[0][0].chunk(2)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------ long rows


@pytest.fixture
def warnings_of(monkeypatch):
    messages = []
    monkeypatch.setattr(training_vila.logger, "warning_once", messages.append)
    return messages


def test_long_row_loses_its_end(processor, warnings_of):
    whole = VilaDataCollator(processor).encode_row(TEXT_ROW)
    length = len(whole["input_ids"]) - 3
    cut = VilaDataCollator(processor, max_length=length).encode_row(TEXT_ROW)
    assert cut["input_ids"].equal(whole["input_ids"][:length])
    assert cut["labels"].equal(whole["labels"][:length])
    assert len(warnings_of) == 1 and str(length) in warnings_of[0]
    assert VilaDataCollator(processor, max_length=length + 3).encode_row(TEXT_ROW)["labels"].equal(whole["labels"])
    assert len(warnings_of) == 1


def test_cut_never_goes_through_a_picture(lite, processor, warnings_of):
    """Every length: what is left has exactly the features that its placeholders need."""
    model = load(lite).eval()
    whole = VilaDataCollator(processor).encode_row(TWO_PICTURES_ROW)
    positions = (whole["input_ids"] == processor.image_token_id).nonzero().flatten().tolist()
    counts = set()
    for length in range(1, len(whole["input_ids"]), 7):
        collate = VilaDataCollator(processor, max_length=length)
        cut = collate.encode_row(TWO_PICTURES_ROW)
        limit = len(cut["input_ids"])
        assert limit <= length and (limit == length or limit in positions)
        assert cut["input_ids"].equal(whole["input_ids"][:limit])
        counts.add(len(cut.get("image_grid_thw", [])))
        with torch.no_grad():
            model(**collate([TWO_PICTURES_ROW]))
    assert counts == {0, 1, 2}


def test_cut_drops_the_pixels_of_the_last_picture_only(processor, warnings_of):
    whole = VilaDataCollator(processor).encode_row(TWO_PICTURES_ROW)
    last = int((whole["input_ids"] == processor.image_token_id).nonzero()[-1])
    cut = VilaDataCollator(processor, max_length=last).encode_row(TWO_PICTURES_ROW)
    assert cut["image_grid_thw"].equal(whole["image_grid_thw"][:1])
    tiles = len(whole["pixel_values"]) // 2
    assert cut["pixel_values"].equal(whole["pixel_values"][:tiles])


def test_row_that_teaches_nothing_any_more_is_said_once(processor, warnings_of):
    batch = VilaDataCollator(processor, max_length=20)([PICTURE_ROW])
    assert not kept(batch["labels"])
    assert any("teach nothing" in message for message in warnings_of)


def test_batch_without_labels_leaves_the_weights_alone(lite, processor, warnings_of):
    model = load(lite).train()
    model(**VilaDataCollator(processor, max_length=20)([TEXT_ROW])).loss.backward()
    assert all(not weight.grad.any() for weight in model.parameters())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "remove_unused_columns=False"),
        ({"messages": [{"role": "user", "content": "a"}]}, "nothing to learn"),
        ({"messages": []}, "non-empty"),
    ],
)
def test_rows_that_cannot_be_learned_are_refused(processor, row, message):
    with pytest.raises(ValueError, match=message):
        VilaDataCollator(processor)([row])


@pytest.mark.parametrize(
    "options", [{"max_length": 0}, {"pad_to_multiple_of": 0}, {"packing": True, "pad_to_multiple_of": 8}]
)
def test_options_without_sense_are_refused(processor, options):
    with pytest.raises(ValueError):
        VilaDataCollator(processor, **options)


# ----------------------------------------------------------------------------------------------------------- videos


@pytest.mark.parametrize("as_images", [True, False])
def test_videos_pass_through_and_are_cut_like_pictures(lite, processor, warnings_of, as_images):
    processor.video_as_images = as_images
    video = {"type": "video", "video": [PICTURE["image"]] * 4}
    row = chat([video, text("What happens?")], "It ends.", [video], "Again.")
    model = load(lite).eval()
    whole = VilaDataCollator(processor)([row])
    pixels, grid = ("pixel_values", "image_grid_thw") if as_images else ("pixel_values_videos", "video_grid_thw")
    assert model(**whole).loss.isfinite()
    token = processor.image_token_id if as_images else processor.video_token_id
    last = int((whole["input_ids"][0] == token).nonzero()[-1])
    cut = VilaDataCollator(processor, max_length=last)([row])
    assert len(cut[pixels]) < len(whole[pixels]) and len(cut[grid]) == len(whole[grid]) - 1
    assert model(**cut).loss.isfinite()


# ------------------------------------------------------------------------------------------------------------- loss


def test_soft_loss_without_time_labels_is_cross_entropy():
    logits, labels = torch.randn(2, 7, 20), torch.randint(0, 10, (2, 7))
    labels[0, :3] = -100
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 20), labels[:, 1:].flatten())
    torch.testing.assert_close(soft_time_loss(logits, labels, [15, 16]), expected)


def test_soft_loss_is_hard_for_a_narrow_gaussian_and_flat_for_a_wide_one():
    logits, labels, times = torch.randn(1, 5, 20), torch.tensor([[0, 11, 12, 10, 14]]), list(range(10, 15))
    hard = F.cross_entropy(logits[0, :-1], labels[0, 1:])
    torch.testing.assert_close(soft_time_loss(logits, labels, times, std=1e-2), hard)
    flat = -logits[0, :-1].log_softmax(-1)[:, times].mean()
    torch.testing.assert_close(soft_time_loss(logits, labels, times, std=1e4), flat)


def test_soft_loss_prefers_the_neighbour_to_a_far_time():
    labels, times = torch.tensor([[0, 12]]), list(range(10, 20))

    def loss_of_saying(token):
        return soft_time_loss(5 * F.one_hot(torch.tensor([[token, 0]]), 20).float(), labels, times)

    assert loss_of_saying(12) < loss_of_saying(13) < loss_of_saying(18)


def test_soft_loss_divides_by_the_items_of_all_accumulated_steps():
    logits, labels = torch.randn(1, 5, 20), torch.tensor([[0, 11, 12, 3, -100]])
    mean = soft_time_loss(logits, labels, [11, 12])
    torch.testing.assert_close(soft_time_loss(logits, labels, [11, 12], num_items_in_batch=6), mean / 2)
    tensor = torch.tensor(6)
    torch.testing.assert_close(soft_time_loss(logits, labels, [11, 12], num_items_in_batch=tensor), mean / 2)


def test_model_takes_the_soft_loss_from_its_config(lite, processor):
    model = load(lite).eval()
    batch = VilaDataCollator(processor)([TEXT_ROW])
    targets = sorted(set(kept(batch["labels"])))
    with torch.no_grad():
        hard = model(**batch)
        model.config.time_token_ids, model.config.soft_ce_std = targets, 3.0
        soft = model(**batch).loss
        halved = model(**batch, num_items_in_batch=2 * len(kept(batch["labels"]))).loss
    expected = soft_time_loss(hard.logits, batch["labels"], targets, std=3.0)
    assert not torch.isclose(soft, hard.loss)
    torch.testing.assert_close(soft, expected)
    torch.testing.assert_close(halved, soft / 2)


@pytest.mark.parametrize(
    "options",
    [{"time_token_ids": [1, 1]}, {"time_token_ids": [10**6]}, {"time_token_ids": [-1]}, {"soft_ce_std": 0.0}],
)
def test_config_refuses_time_tokens_without_sense(lite, options):
    config = load(lite).config.to_dict()
    with pytest.raises(ValueError, match=r"time_token_ids|soft_ce_std"):
        AutoModel.from_config(type(load(lite).config).from_dict({**config, **options}))


# --------------------------------------------------------------------------------------------------------- freezing


def test_train_only_freezes_the_rest(lite):
    model = load(lite)
    assert set(PARTS) - set(parts_of(model)) == {"depth_transformer"}
    for part in parts_of(model):
        names = PARTS[part]
        train_only(model, [part])
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        assert trained and all(name.startswith(names) for name in trained)
    train_only(model, parts_of(model))
    assert all(weight.requires_grad for weight in model.parameters())
    with pytest.raises(ValueError, match="vision_tower"):
        train_only(model, ["tower"])
    with pytest.raises(ValueError, match="depth_transformer"):
        train_only(model, ["depth_transformer"])
    with pytest.raises(ValueError, match="none"):
        train_only(model, [])


def test_training_builds_no_cache(lite):
    model, ids = load(lite), torch.tensor([[5, 6, 7]])
    assert model.train()(ids).past_key_values is None and model.eval()(ids).past_key_values is not None
    assert model.train()(ids, use_cache=True).past_key_values is not None


def test_frozen_tower_stays_in_inference_mode(lite):
    model = load(lite)
    model.model.vision_tower.requires_grad_(False)
    model.train()
    assert not any(module.training for module in model.model.vision_tower.modules())
    assert model.model.multi_modal_projector.training and model.model.language_model.training
    model.model.vision_tower.requires_grad_(True)
    assert model.train().model.vision_tower.training


def count_tower_runs(model):
    runs = []
    model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize(
    ("tuned", "trains", "expected"),
    [
        (["vision_tower", "projector", "language_model"], True, 1),
        (["projector"], True, 1),
        (["language_model"], True, 0),
        (["projector"], False, 0),
    ],
)
def test_tower_runs_without_pictures_only_where_it_or_the_projector_is_trained(
    lite, processor, tuned, trains, expected
):
    model = train_only(load(lite), tuned).train(trains)
    runs = count_tower_runs(model)
    batch = VilaDataCollator(processor)([TEXT_ROW])
    model(**batch)
    assert len(runs) == expected
    with torch.no_grad():
        model(**batch)
    assert len(runs) == expected


@pytest.mark.parametrize("name", [LITE, "nvila_dynamic_s2_image", "vila15_s2_image", "vila15_clip_image"])
def test_zero_tile_changes_nothing_and_reaches_every_weight(converted, name):
    folder = converted(name)
    model = load(folder)
    batch = VilaDataCollator(AutoProcessor.from_pretrained(folder))([TEXT_ROW])
    expected = model.eval()(**batch).loss
    loss = model.train()(**batch).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for weight in (*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()):
        assert weight.grad is not None and not weight.grad.any()


DISTRIBUTED_STEP = """
import os, sys, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from PIL import Image
from transformers import AutoModel, AutoProcessor
from vila.training_vila import VilaDataCollator

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, folder = dist.get_rank(), sys.argv[1]
model = AutoModel.from_pretrained(folder, dtype="float32").train()
picture = [{"type": "image", "image": Image.new("RGB", (90, 60), "red")}, {"type": "text", "text": "What?"}]
messages = [{"role": "user", "content": picture if rank else "What?"}, {"role": "assistant", "content": "A cat."}]
batch = VilaDataCollator(AutoProcessor.from_pretrained(folder))([{"messages": messages}])
assert ("pixel_values" in batch) == bool(rank)


def step(wrapped):
    for _ in range(2):  # DDP complains of missing gradients in the step that follows
        wrapped.zero_grad()
        wrapped(**batch).loss.backward()
    for name, weight in wrapped.named_parameters():
        if not weight.requires_grad:
            continue
        grad = weight.grad.full_tensor() if hasattr(weight.grad, "full_tensor") else weight.grad
        other = grad.clone()
        dist.broadcast(other, src=1)
        assert torch.equal(grad, other), name
        assert "projector" not in name or grad.any(), name


step(DistributedDataParallel(model, find_unused_parameters=False))
# sharded weights are gathered by all processes or by none, frozen ones too
model.config.vision_chunk_size = 1000
model.model.vision_tower.requires_grad_(False)
model.model.multi_modal_projector.requires_grad_(False)
model.zero_grad()
fully_shard(model.model.vision_tower)
step(fully_shard(model).train())
dist.destroy_process_group()
"""


def test_process_without_pictures_does_not_hang_the_others(lite):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DISTRIBUTED_STEP, lite],
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=90)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors


# ---------------------------------------------------------------------------------------------------------- Trainer


def train(model, folder, processor, steps=6, packing=False, **options):
    arguments = {"learning_rate": 5e-3, "max_grad_norm": 1.0, "lr_scheduler_type": "constant", **options}
    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder),
            remove_unused_columns=False,
            per_device_train_batch_size=2,
            max_steps=steps,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            save_strategy="no",
            **arguments,
        ),
        data_collator=VilaDataCollator(processor, packing=packing),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        processing_class=processor,
    )
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("checkpointing", "bf16", "packing"), [(False, False, False), (True, False, True), (True, True, False)]
)
def test_trainer_lowers_the_loss(lite, processor, tmp_path, checkpointing, bf16, packing):
    options = {"activation_checkpointing": checkpointing, "bf16": bf16}
    _, losses = train(load(lite), tmp_path, processor, packing=packing, **options)
    assert losses[-1] < 0.8 * losses[0]


def test_checkpointing_does_not_change_the_gradients(lite, processor):
    batch = VilaDataCollator(processor)(ROWS)
    gradients = []
    for checkpointing in (False, True):
        model = load(lite).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**batch).loss.backward()
        gradients.append([weight.grad for weight in model.parameters()])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed)


def test_trainer_evaluates_with_metrics(lite, processor, tmp_path):
    """Predictions of batches with and without pictures are gathered; the features of pictures are not."""
    trainer, _ = train(load(lite), tmp_path, processor, steps=1, per_device_eval_batch_size=1)
    trainer.compute_metrics = lambda prediction: {"rows": len(prediction.predictions)}
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] == 2 and math.isfinite(metrics["eval_loss"])


def test_tuned_model_saves_and_loads_with_its_processor(lite, processor, tmp_path):
    trainer, _ = train(load(lite), tmp_path, processor, steps=2)
    trainer.save_model()
    again = AutoModel.from_pretrained(tmp_path, dtype="float32").eval()
    batch = VilaDataCollator(AutoProcessor.from_pretrained(tmp_path))(ROWS)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, trainer.model.eval()(**batch).logits)
    assert again.generation_config.suppress_tokens == load(lite).generation_config.suppress_tokens


@pytest.mark.parametrize("name", [LITE, "vila15_intern_image", "vila15_clip_image"])
@pytest.mark.parametrize("original_names", [True, False])
def test_state_dict_of_a_saved_folder_loads_as_trainer_loads_it(converted, tmp_path, name, original_names):
    """`Trainer` resumes with `load_state_dict`, which knows nothing of the names that `save_pretrained` writes."""
    from safetensors.torch import load_file

    model = load(converted(name))
    model.save_pretrained(tmp_path, save_original_format=original_names)
    blank = AutoModel.from_config(model.config)
    result = blank.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(result.missing_keys) <= tied and not result.unexpected_keys
    for old, new in zip(model.parameters(), blank.parameters()):
        assert torch.equal(old, new)


# ------------------------------------------------------------------------------------------------------------- PEFT


def test_lora_trains_saves_loads_and_merges(lite, processor, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    adapted = get_peft_model(load(lite), LoraConfig(r=4, target_modules=LORA_TARGETS))
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert trained and all(".language_model.layers." in name and "lora_" in name for name in trained)
    assert sum("q_proj.lora_A" in name for name in trained) == adapted.config.text_config.num_hidden_layers
    _, losses = train(adapted, tmp_path, processor, learning_rate=5e-2, activation_checkpointing=True)
    assert losses[-1] < 0.9 * losses[0]

    batch = VilaDataCollator(processor)(ROWS)
    with torch.no_grad():
        expected = adapted.eval()(**batch).logits
        adapted.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(load(lite), tmp_path / "adapter").eval()
        torch.testing.assert_close(again(**batch).logits, expected)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-4, rtol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(load(tmp_path / "merged").eval()(**batch).logits, merged(**batch).logits)
        assert not torch.allclose(load(lite).eval()(**batch).logits, expected, atol=1e-2)


# ------------------------------------------------------------------------------------------------------- resolution


def test_resized_position_embeddings_are_linear_between_rows_and_zero_on_them():
    weight = torch.arange(1, 6).float().unsqueeze(1).repeat(1, 3)
    resized = resize_position_embeddings(weight, 9)
    assert resized[:, 0].tolist() == [0, 1.5, 0, 2.5, 0, 3.5, 0, 4.5, 0]
    assert resize_position_embeddings(weight.bfloat16(), 9).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="1 position"):
        resize_position_embeddings(weight[:1], 9)


def test_another_resolution_trains_saves_and_loads(lite, processor, tmp_path):
    model = load(lite)
    before = VilaDataCollator(processor)(ROWS)
    set_vision_resolution(model, processor, 112)
    batch = VilaDataCollator(processor)(ROWS)
    assert batch["pixel_values"].shape[-2:] == (112, 112) != before["pixel_values"].shape[-2:]
    model.train()(**batch).loss.backward()
    assert model.model.vision_tower.embeddings.position_embedding.weight.grad.any()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = VilaDataCollator(AutoProcessor.from_pretrained(tmp_path))(ROWS)
    assert again["pixel_values"].equal(batch["pixel_values"])
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path).eval()(**again).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("name", ["vila15_clip_image", "nvila_dynamic_s2_image"])
def test_another_resolution_is_for_plain_siglip_models(converted, name):
    folder = converted(name)
    with pytest.raises(ValueError, match="SigLIP"):
        set_vision_resolution(load(folder), AutoProcessor.from_pretrained(folder), 112)


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


# ------------------------------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, (None, 1.0)),
        ({"time_token_ids": [20, 21, 22], "soft_ce_std": 2.5}, ([20, 21, 22], 2.5)),
        ({"num_time_tokens": 3, "time_token_format": "<t{t}>"}, (None, 1.0)),
        ({"time_token_ids": [10**6]}, (None, 1.0)),
    ],
)
def test_conversion_reads_time_tokens_and_writes_them_back(tmp_path, keys, expected):
    import shutil

    from vila.conversion_vila import convert, to_original

    source = shutil.copytree(COMMITTED_GOLDENS / "vila" / LITE / "checkpoint", tmp_path / "source")
    config = source / "config.json"
    config.chmod(0o644)
    config.write_text(json.dumps({**json.loads(config.read_text()), **keys}))
    converted = convert(source, tmp_path / "converted", copy=True)
    loaded = load(converted).config
    assert (loaded.time_token_ids, loaded.soft_ce_std) == expected
    root = json.loads((to_original(converted, tmp_path / "back") / "config.json").read_text())
    assert (root["time_token_ids"] or None, root["soft_ce_std"]) == expected


def test_conversion_finds_time_tokens_by_their_names():
    from vila.conversion_vila import time_token_ids

    class Tokenizer:
        def get_vocab(self):
            return {"<t0>": 7, "<t1>": 8, "<t2>": 9}

    root = {"num_time_tokens": 3, "time_token_format": "<t{t}>"}
    assert time_token_ids(root, Tokenizer(), 10) == [7, 8, 9]
    assert time_token_ids(root, Tokenizer(), 9) is None
    assert time_token_ids({"num_time_tokens": 4}, Tokenizer(), 10) is None
    assert time_token_ids({"num_time_tokens": 0}, Tokenizer(), 10) is None
