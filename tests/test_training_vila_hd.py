"""Training VILA-HD: what each loss reaches, boxes, and the command."""

import copy
import importlib.util
import json

import pytest
import torch
from conftest import REPOSITORY
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments
from vila.training_vila_hd import SELECTION_PARTS, VilaHDDataCollator, box_map, train_selection_only
from vila.vision_vila_hd import selection_loss
from vila_hd_requests import NONE, ONE, TWO, text

SIZE = 280


@pytest.fixture(scope="module")
def processor(vila_hd_folder):
    return AutoProcessor.from_pretrained(vila_hd_folder)


@pytest.fixture
def trainable(vila_hd_folder):
    return AutoModel.from_pretrained(vila_hd_folder, dtype="float32").train()


def row(question=ONE, answer="red"):
    return {"messages": [*copy.deepcopy(question), {"role": "assistant", "content": [text(answer)]}]}


BOX_ROW = {"messages": ONE, "boxes": [[(0.2, 0.3, 0.6, 0.9)]]}


def gradients(model, batch):
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {name: grad for name, grad in grads.items() if grad.abs().sum() > 0}


def test_selection_loss_reaches_what_chooses_and_nothing_behind(trainable, processor):
    trainable.config.token_selection_loss_weight = 1.0
    trained = gradients(trainable, VilaHDDataCollator(processor)([BOX_ROW]))
    for part in SELECTION_PARTS:
        assert any(name.startswith(part) for name in trained), part
    assert any(name.startswith("model.vision_tower.trunk.blocks") for name in trained)
    assert not any(name.startswith(("model.language_model", "lm_head")) for name in trained)
    assert not any(name.startswith("model.multi_modal_projector.layers") for name in trained)


def test_selection_alone_can_be_trained(trainable, processor):
    trainable.config.token_selection_loss_weight = 1.0
    trained = gradients(train_selection_only(trainable), VilaHDDataCollator(processor)([BOX_ROW]))
    assert trained and all(name.startswith(SELECTION_PARTS) for name in trained)


def test_language_model_loss_reaches_all_but_what_chooses(trainable, processor):
    trained = gradients(trainable, VilaHDDataCollator(processor)([row()]))
    for part in ("lm_head", "model.language_model", "model.multi_modal_projector.layers"):
        assert any(name.startswith(part) for name in trained), part
    for part in ("model.vision_tower.pos_emb_residual", "model.multi_modal_projector.high_res_scale_embed"):
        assert any(name.startswith(part) for name in trained), part
    assert not any(name.startswith(SELECTION_PARTS) for name in trained)


@pytest.mark.parametrize("rows", [[row()], [row(NONE)], [BOX_ROW, row(TWO)]], ids=["picture", "text", "boxes"])
def test_every_weight_that_is_used_has_a_gradient_in_every_step(rows, trainable, processor):
    """Data-parallel processes wait for each other's gradients, whatever their rows hold."""
    trainable.config.token_selection_loss_weight = 1.0
    trainable(**VilaHDDataCollator(processor)(rows)).loss.backward()
    missing = [name for name, weight in trainable.named_parameters() if weight.grad is None]
    assert not [name for name in missing if "blocks.2" not in name], missing


def test_pictures_without_a_target_have_no_selection_loss():
    probs = [torch.rand(2, 4, 4), torch.rand(2, 8, 8)]
    wanted = torch.zeros(2, 16, 16)
    wanted[0, 3:9, 3:9] = 1
    alone = selection_loss([scale[:1] for scale in probs], wanted[:1])
    torch.testing.assert_close(selection_loss(probs, wanted), alone)
    wanted[1] = -1
    torch.testing.assert_close(selection_loss(probs, wanted), alone)
    assert selection_loss(probs, -torch.ones(2, 16, 16)) == 0


def test_boxes_become_maps(processor):
    wanted = box_map([(0.0, 0.5, 0.1, 0.6)], 20, 10)
    assert wanted[10:13, 0:2].all() and wanted.sum() == 6
    assert (box_map(None, 4, 4) == -1).all()
    with pytest.raises(ValueError, match="box"):
        box_map([(0.5, 0.0, 0.1, 1.0)], 4, 4)
    batch = VilaHDDataCollator(processor)([BOX_ROW, row(TWO)])
    assert batch["gt_selection_maps"].shape == (3, SIZE, SIZE)
    assert (batch["gt_selection_maps"][1:] == -1).all()
    assert (batch["labels"][0] == -100).all() and (batch["labels"][1] != -100).any()
    assert "gt_selection_maps" not in VilaHDDataCollator(processor)([row()])


def test_first_look_follows_the_target_in_training_if_asked(trainable, processor):
    trainable.config.select_gt_in_training = True
    batch = VilaHDDataCollator(processor)([BOX_ROW])
    with torch.no_grad():
        chosen = trainable(**batch, num_look_close=1).selection_maps[1][0]
    inside = torch.nn.functional.interpolate(batch["gt_selection_maps"][None], size=(10, 10), mode="area")[0, 0] > 0
    inside = inside.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert inside[chosen > 0].all()


@pytest.fixture
def train():
    # by its file: examples/nano has a module of the same name
    spec = importlib.util.spec_from_file_location("examples_train", REPOSITORY / "examples" / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def train_on(train, folder, tmp_path, rows, *options):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    fixed = ["--model", str(folder), "--data", str(file), "--output", str(tmp_path / "out"), "--max_steps", "1"]
    train([*fixed, "--learning_rate", "1e-2", "--save_strategy", "no", "--disable_tqdm", "True", *options])
    return AutoModel.from_pretrained(tmp_path / "out", dtype="float32")


def test_command_learns_where_to_look_from_boxes(train, vila_hd_folder, trainable, tmp_path):
    tuned = train_on(train, vila_hd_folder, tmp_path, [BOX_ROW], "--token_selection_loss_weight", "1")
    changed = {
        name for name, weight in tuned.named_parameters() if not torch.equal(weight, trainable.get_parameter(name))
    }
    for part in SELECTION_PARTS:
        assert any(name.startswith(part) for name in changed), part
    assert not any(name.startswith("model.language_model") for name in changed)
    assert tuned.config.token_selection_loss_weight == 1


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([BOX_ROW], [], "teach nothing"),
        ([row()], ["--token_selection_loss_weight", "-1"], "token_selection_loss_weight"),
        ([row()], ["--packing", "True"], "packed"),
    ],
)
def test_command_refuses_boxes_that_teach_nothing(train, vila_hd_folder, tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        train_on(train, vila_hd_folder, tmp_path, rows, *options)


def test_command_refuses_boxes_of_models_that_do_not_choose(train, converted, tmp_path):
    with pytest.raises(ValueError, match="VILA-HD"):
        train_on(train, converted("nvila_lite_image"), tmp_path, [BOX_ROW])


def test_accumulated_rows_are_averaged(vila_hd_folder, processor, tmp_path):
    """A step of plain SGD moves every weight by the mean of the gradients of the rows."""
    trained = AutoModel.from_pretrained(vila_hd_folder, dtype="float32").train()
    trained.config.token_selection_loss_weight = 1.0
    before = {name: weight.detach().clone() for name, weight in trained.named_parameters()}
    rows, collator = [BOX_ROW, row()], VilaHDDataCollator(processor)
    apart = [gradients(trained, collator([own])) for own in rows]
    arguments = TrainingArguments(
        str(tmp_path),
        remove_unused_columns=False,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=len(rows),
        max_steps=1,
        max_grad_norm=0,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
    )
    optimizer = torch.optim.SGD(trained.parameters(), lr=1.0)
    Trainer(trained, arguments, collator, rows, optimizers=(optimizer, None)).train()
    moved = {name: before[name] - weight.detach() for name, weight in trained.named_parameters()}
    for number, part in enumerate(("selection_feature_proj", "language_model")):
        name = next(name for name in apart[number] if part in name)
        mean = sum(own.get(name, torch.zeros(())) for own in apart) / len(rows)
        assert torch.allclose(moved[name], mean, atol=1e-6), name


def test_trainer_lowers_both_losses(trainable, processor, tmp_path):
    trainable.config.token_selection_loss_weight = 1.0
    rows = [row(), BOX_ROW, row(NONE, "left"), row(TWO, "a cat")]
    trainer = Trainer(
        trainable,
        TrainingArguments(
            str(tmp_path),
            remove_unused_columns=False,
            per_device_train_batch_size=4,
            max_steps=6,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
        ),
        data_collator=VilaHDDataCollator(processor),
        train_dataset=rows,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert trainer.evaluate(rows)["eval_loss"] > 0
    # pictures and prompts of the batches differ in number: only logits can be gathered
    assert trainer.predict(rows[:1]).predictions.shape[-1] == trainable.config.text_config.vocab_size


def test_packed_rows_are_refused(trainable, processor):
    with pytest.raises(ValueError, match="packed"):
        VilaHDDataCollator(processor, packing=True)
    batch = VilaHDDataCollator(processor)([row()])
    with pytest.raises(ValueError, match="packed"):
        trainable(**batch, position_ids=torch.arange(batch["input_ids"].shape[1])[None])
