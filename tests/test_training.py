"""Fine-tuning: losses, freezing, distributed steps, Trainer, PEFT, resolution and conversion."""

import json
import math
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import COMMITTED_GOLDENS
from training_rows import LITE, ROWS, TEXT_ROW, kept, load
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments
from vila.loss_vila import soft_time_loss
from vila.training_vila import (
    LORA_TARGETS,
    PARTS,
    VilaDataCollator,
    parts_of,
    resize_position_embeddings,
    set_vision_resolution,
    train_only,
)


@pytest.fixture
def processor(lite):
    return AutoProcessor.from_pretrained(lite)


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
