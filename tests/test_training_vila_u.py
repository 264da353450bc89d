"""Training VILA-U: which pictures are drawn, what the loss is made of, and that `Trainer` learns with it."""

import math

import pytest
import torch
from test_vila_u import noise_picture, user
from transformers import AutoConfig, AutoModel, Trainer, TrainingArguments
from vila import VilaUForConditionalGeneration
from vila.tiling_vila import crop_square
from vila.training_vila import VilaDataCollator, parts_of, train_only
from vila.training_vila_u import VilaUDataCollator

PICTURE, OTHER, THIRD = noise_picture(1), noise_picture(2, (90, 40)), noise_picture(3, (40, 90))


def says(*content):
    return {**user(*content)[0], "role": "assistant"}


def video(*frames):
    return {"type": "video", "video": list(frames)}


DRAWS = {"messages": [*user("A snowy mountain."), says(OTHER)]}
ANSWERS = {"messages": [*user(PICTURE, "What is this?"), says("A house.")]}
CHATS = {"messages": [*user("Hello!"), says("Hi.")]}
FILM = {
    "messages": [*user("Fireworks."), {"role": "assistant", "content": [video(OTHER, THIRD, OTHER)]}],
}
ROWS = [DRAWS, ANSWERS, CHATS, FILM]


@pytest.fixture
def model(vila_u_model):
    return vila_u_model


@pytest.fixture
def processor(vila_u_processor):
    return vila_u_processor


@pytest.fixture
def collator(processor):
    return VilaUDataCollator(processor)


def tokens_of(processor, ids):
    return [
        processor.image_token
        if token == processor.image_token_id
        else processor.tokenizer.convert_ids_to_tokens(token)
        for token in ids.tolist()
    ]


def learned(processor, row):
    return tokens_of(processor, row["labels"][row["labels"] != -100])


def test_drawn_picture_is_learned_between_its_tokens(collator, processor):
    row = collator.encode_row(DRAWS)
    assert learned(processor, row) == ["\u2581", "<im_start>", *["<image>"] * 64, "<im_end>", "</s>"]


def test_picture_of_the_user_is_marked_as_in_training_and_not_learned(collator, processor):
    row = collator.encode_row(ANSWERS)
    tokens = tokens_of(processor, row["input_ids"])
    at = tokens.index("<image>")
    assert tokens[at - 1] == "<im_start>" and tokens[at + 64 : at + 66] == ["<im_end>", "<0x0A>"]
    assert "<image>" not in learned(processor, row)


def test_pictures_anywhere_in_an_answer_are_learned(collator, processor):
    row = {"messages": [*user(PICTURE, "Vary it."), says("First", OTHER, "then", THIRD, "done.")]}
    encoded = collator.encode_row(row)
    assert learned(processor, encoded).count("<image>") == 2 * 64
    assert learned(processor, encoded).count("<im_end>") == 2 and learned(processor, encoded)[-2:] == [".", "</s>"]
    assert len(encoded["pixel_values"]) == 3


def test_frames_of_a_drawn_video_follow_each_other(collator, processor):
    row = collator.encode_row(FILM)
    assert learned(processor, row) == ["\u2581", "<vi_start>", *["<image>"] * 192, "<vi_end>", "</s>"]


def test_frames_of_a_seen_video_are_marked_one_by_one(collator, processor):
    chat = [{"role": "user", "content": [video(OTHER, THIRD)]}, says("Yes.")]
    tokens = tokens_of(processor, collator.encode_row({"messages": chat})["input_ids"])
    at = tokens.index("<image>")
    middle = tokens[at + 64 : tokens.index("<image>", at + 64)]
    assert middle[:2] == ["<im_end>", "<0x0A>"] and middle[-1] == "<im_start>"


def test_drawn_pictures_are_cropped_and_seen_ones_squeezed(collator, processor):
    both = collator.encode_row({"messages": [*user(OTHER, "Again."), says(OTHER)]})
    seen, drawn = both["pixel_values"]
    expected = processor.image_processor([OTHER, crop_square(OTHER)], return_tensors="pt")["pixel_values"]
    assert torch.equal(torch.stack([seen, drawn]), expected)
    assert not torch.equal(seen, drawn)


def test_start_token_that_was_typed_draws_nothing(collator, processor):
    row = collator.encode_row({"messages": [*user("Hi"), says("<im_start> is a token")]})
    assert "<image>" not in learned(processor, row) and "<im_start>" not in learned(processor, row)


def test_understanding_without_marks_is_inferences(processor):
    plain = VilaDataCollator(processor).encode_row(ANSWERS)
    assert "<im_start>" not in tokens_of(processor, plain["input_ids"])


def test_request_is_dropped_at_the_asked_rate_from_rows_that_only_draw(processor):
    torch.manual_seed(0)
    half = VilaUDataCollator(processor, caption_dropout=0.5)
    lengths = [len(half.encode_row(DRAWS)["input_ids"]) for _ in range(60)]
    assert len(set(lengths)) == 2 and 15 <= lengths.count(min(lengths)) <= 45
    always = VilaUDataCollator(processor, caption_dropout=1)
    dropped = always.encode_row(DRAWS)["input_ids"]
    negative = torch.tensor(processor(text="anything", generation_mode="image")["negative_prompt_ids"][0])
    assert torch.equal(dropped[: len(negative)], negative)
    for row in (ANSWERS, CHATS):
        assert torch.equal(
            always.encode_row(row)["input_ids"], VilaUDataCollator(processor).encode_row(row)["input_ids"]
        )


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_rate_without_sense_is_refused(processor, rate):
    with pytest.raises(ValueError, match="caption_dropout"):
        VilaUDataCollator(processor, caption_dropout=rate)


def test_packed_loss_equals_the_unpacked_one(model, processor):
    with torch.no_grad():
        padded = model(**VilaUDataCollator(processor)(ROWS))
        packed = model(**VilaUDataCollator(processor, packing=True)(ROWS))
    for name in ("loss", "text_loss", "image_loss"):
        torch.testing.assert_close(packed[name], padded[name], atol=1e-5, rtol=0)
    torch.testing.assert_close(padded.loss, padded.text_loss + padded.image_loss)


def test_image_loss_is_the_mean_over_all_codes_of_drawn_pictures(model, processor):
    collator = VilaUDataCollator(processor)
    with torch.no_grad():
        losses = [model(**collator([row])).image_loss for row in (DRAWS, FILM)]
        both = model(**collator([DRAWS, ANSWERS, FILM])).image_loss
    torch.testing.assert_close(both, (losses[0] + 3 * losses[1]) / 4, atol=1e-5, rtol=0)


def test_image_loss_is_that_of_the_logits_which_draw(model, processor):
    """Cross entropy of the codes under the depth logits that `generate()` would guide with."""
    batch = VilaUDataCollator(processor)([DRAWS])
    prompt_end = (batch["input_ids"][0] == processor.image_token_id).nonzero()[0].item()
    codes = model.encode_image(batch["pixel_values"])[0]
    with torch.no_grad():
        expected = model(**batch).image_loss
        hidden = model.model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"]).last_hidden_state[0]
        states = hidden[prompt_end - 1 : prompt_end + 63]
        logits = model.model.depth_transformer(states, model.model.quantizer.embed(codes))
    chosen = logits.log_softmax(-1).gather(-1, codes.unsqueeze(-1))
    torch.testing.assert_close(expected, -chosen.mean())


def test_batches_of_one_kind_have_a_finite_loss_and_reach_every_trained_part(model, processor):
    for rows in ([CHATS], [DRAWS], [ANSWERS]):
        model.zero_grad()
        output = model.train()(**VilaUDataCollator(processor)(rows))
        output.loss.backward()
        assert output.loss.isfinite()
        assert all(weight.grad is not None for weight in model.model.depth_transformer.parameters())
    assert model(**VilaUDataCollator(processor)([CHATS])).image_loss == 0
    model.zero_grad()
    model.eval()


def test_every_weight_that_is_to_be_trained_gets_a_gradient(vila_u_folder, processor):
    """Also without a picture: data-parallel processes wait for each other's gradients."""
    fresh = VilaUForConditionalGeneration(AutoConfig.from_pretrained(vila_u_folder))
    for trained in (fresh, AutoModel.from_pretrained(vila_u_folder, dtype="float32")):
        for rows in ([CHATS], [DRAWS], [ANSWERS, FILM]):
            trained.zero_grad()
            trained.train()(**VilaUDataCollator(processor)(rows)).loss.backward()
            missing = [name for name, w in trained.named_parameters() if w.requires_grad and w.grad is None]
            assert not missing
        assert not any(weight.requires_grad for weight in trained.model.pixel_decoder.parameters())


def test_labels_that_ask_for_codes_where_there_is_no_picture_are_refused(model, processor):
    batch = VilaUDataCollator(processor)([CHATS])
    batch["labels"][0, 3] = processor.image_token_id
    with pytest.raises(ValueError, match="labels ask for 1"):
        model(**batch)


def test_dropout_is_the_configs_and_only_in_training(vila_u_folder, processor):
    batch = VilaUDataCollator(processor)([DRAWS])

    def losses(rate, training):
        trained = AutoModel.from_pretrained(vila_u_folder, dtype="float32", depth_dropout=rate).train(training)
        with torch.no_grad():
            return [trained(**batch).image_loss.item() for _ in range(2)]

    assert len(set(losses(0.1, False) + losses(0.0, True) + losses(0.0, False))) == 1
    assert len(set(losses(0.1, True))) == 2


def test_parts_to_train_are_named(vila_u_folder):
    trained = train_only(AutoModel.from_pretrained(vila_u_folder), ["depth_transformer"])
    names = {name for name, weight in trained.named_parameters() if weight.requires_grad}
    assert names and all(name.startswith("model.depth_transformer.") for name in names)
    assert parts_of(trained) == ["vision_tower", "projector", "language_model", "depth_transformer"]


@pytest.mark.parametrize("packing", [False, True])
def test_trainer_lowers_both_losses(vila_u_folder, processor, tmp_path, packing):
    trained = AutoModel.from_pretrained(vila_u_folder, dtype="float32", depth_dropout=0.0)
    collator = VilaUDataCollator(processor, packing=packing)
    arguments = TrainingArguments(
        tmp_path,
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )

    def measure():
        with torch.no_grad():
            output = trained.eval()(**VilaUDataCollator(processor)(ROWS))
        return output.text_loss.item(), output.image_loss.item()

    before = measure()
    tower = trained.model.quantizer.codebooks[0].weight.clone()
    trainer = Trainer(trained, arguments, data_collator=collator, train_dataset=ROWS, eval_dataset=ROWS)
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    after = measure()
    assert after[0] < before[0] and after[1] < before[1]
    assert torch.equal(trained.model.quantizer.codebooks[0].weight, tower)
