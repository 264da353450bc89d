"""Fine-tuning: batches with labels, packed or padded, rows that are too long, and videos."""

import pytest
import torch
from training_rows import PICTURE, PICTURE_ROW, ROWS, TEXT_ROW, TWO_PICTURES_ROW, chat, kept, learned_text, load, text
from transformers import AutoProcessor
from vila import training_vila
from vila.training_vila import VilaDataCollator


@pytest.fixture
def processor(lite):
    return AutoProcessor.from_pretrained(lite)


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
