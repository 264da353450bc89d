"""Sequence parallelism: how batches are divided, and that several processes compute what one does."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sequence_processes import BATCHES, NANO, row, tiny, video
from transformers import AutoConfig, AutoProcessor, TrainingArguments
from vila.sequence_collectives_vila import check_heads, key_repeats
from vila.sequence_parallel_vila import SequenceParallel, SharedLayer
from vila.sequence_sharding_vila import BatchSharder, Shard, Unit, divide, pad_packed, row_lengths
from vila.sequence_training_vila import RepeatingSampler, SequenceParallelTrainer, ShardingCollator
from vila.training_vila import VilaDataCollator

SCRIPT = Path(__file__).with_name("sequence_processes.py")
# the same order of operations is not to be had: sums over processes round otherwise
TOLERANCE = 1e-5
SIZES = [2, 4]


SHARED = ("training", "inference", "long_inference", "different_batches")
# what is run in as many processes, in one go; the last takes a process away
RUNS = {
    1: ("trainer",),
    2: (*SHARED, "wrapped", "different_prompts", "readme", "dies"),
    3: ("dies_answering",),
    4: (*SHARED, "tensor_parallel", "trainer", "hangs"),
}


@cache
def processes(size):
    """What the functions of `sequence_processes.py` found, each run once per session."""
    done = subprocess.run(
        [sys.executable, SCRIPT, *RUNS[size], str(size)],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def found(size, name):
    return processes(size)[name]


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(NANO)


@pytest.fixture(scope="module")
def batch(processor):
    return VilaDataCollator(processor, packing=True)(BATCHES["everything"])


# ------------------------------------------------------------------------------------------------- several processes


@pytest.mark.parametrize("size", SIZES)
def test_loss_and_gradients_are_those_of_one_process(size):
    results = found(size, "training")
    assert len(results) == 6
    for result in results.values():
        assert result["loss"] < TOLERANCE and result["gradients"] < TOLERANCE
        assert result["largest"] > 100 * TOLERANCE


@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_divided_and_some_processes_have_none(size):
    tiles = {name: result["tiles"] for name, result in found(size, "training").items()}
    for name, counts in tiles.items():
        assert len(counts) == size and max(counts) - min(counts) <= 2, name
    assert sum(tiles["one tile/4/False/None"]) == 1 and not any(tiles["text/2/False/None"])
    assert sum(tiles["everything/2/False/None"]) == 10 and min(tiles["everything/2/False/None"]) > 0


def test_stopped_model_takes_whole_batches_again():
    assert all(result["after"] == 0 for result in found(2, "training").values())


@pytest.mark.parametrize("size", SIZES)
def test_generation_over_several_processes_is_that_of_one(size):
    result = found(size, "inference")
    assert result["ids"] and result["logits"] < TOLERANCE < result["largest"] / 1000
    assert result["more ids"] and result["more logits"] < TOLERANCE
    assert result["unprepared ids"] and result["unprepared"] < TOLERANCE
    assert result["short"] < TOLERANCE
    assert result["streams"] == ["FrameStream"] and result["streamed"] < TOLERANCE
    assert result["decoded"] == 24 // size
    assert result["prompt"] % size, "the prompt should not divide by the group"


def test_the_lines_of_the_readme_answer_and_go_on():
    result = found(2, "readme")
    assert result["same"] == [True, True] and isinstance(result["answer"], str)


@pytest.mark.parametrize("size", SIZES)
def test_frames_and_cache_are_divided(size):
    result = found(size, "inference")
    assert result["encoded"] == [24 // size] * size
    per_process = -(-result["prompt"] // size)
    assert result["keys"][:-1] == [per_process] * (size - 1)


@pytest.mark.parametrize("size", SIZES)
def test_prompts_that_one_process_takes_in_chunks_are_divided(size):
    result = found(size, "long_inference")
    assert len(result["logits"]) == 5 and max(result["logits"]) < TOLERANCE < result["largest"] / 1000
    for counts, prompt in zip(result["keys"], result["prompts"], strict=True):
        share = -(-prompt // size)
        # the last process keeps the new tokens, too
        assert counts == [*[share] * (size - 1), prompt - share * (size - 1) + 5]
    assert "divided over the processes" in result["refused"]


def test_weights_and_prompt_are_divided_at_the_same_time():
    result = found(4, "tensor_parallel")
    assert result["ids"] and result["logits"] < TOLERANCE
    # half of the query heads, half of the key heads, half of the prompt
    assert result["query channels"] == 24 and result["cache"] == [1, 1, -(-result["prompt"] // 2), 12]


def test_sharded_weights_and_adapters_get_the_gradients_of_one_process():
    results = found(2, "wrapped")
    assert list(results) == ["fsdp/everything", "fsdp/one tile", "adapters/everything", "adapters/one tile"]
    for result in results.values():
        assert result["loss"] < TOLERANCE and result["gradients"] < TOLERANCE < result["largest"] / 100


def test_trainer_in_groups_learns_what_it_learns_in_one_process():
    ours, one = found(4, "trainer"), found(1, "trainer")
    assert ours["losses"] == pytest.approx(one["losses"], abs=TOLERANCE)
    assert ours["weights"] == pytest.approx(one["weights"], abs=TOLERANCE)
    # two groups evaluate two batches at a time and weigh their tokens equally
    assert ours["evaluated"] == pytest.approx(one["evaluated"], rel=1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_processes_with_different_rows_all_end_with_an_error(size):
    assert "different batches" in found(size, "different_batches")["error"]


def test_processes_that_ask_different_questions_all_end_with_an_error():
    ours, theirs = found(2, "different_prompts")
    assert len(ours) == len(theirs) == 3
    assert "different batches" in ours.pop(1), "one that has media compares them, too"
    assert all("different prompts" in error for error in (*ours, *theirs))


def test_others_end_with_an_error_when_a_process_dies():
    result = found(2, "dies")
    assert result["error"] in ("RuntimeError", "DistBackendError") and result["seconds"] < 10


def test_others_end_with_an_error_when_a_process_dies_while_they_answer():
    result = found(3, "dies_answering")
    for step in ("generate", "prepare"):
        assert result[step] in ("RuntimeError", "DistBackendError")
    assert 2 < result["calls"] < 5 and result["seconds"] < 20


def test_others_end_with_an_error_when_a_process_hangs_longer_than_the_timeout():
    result = found(4, "hangs")
    assert result["error"] in ("RuntimeError", "DistBackendError") and 7 < result["seconds"] < 28


# ------------------------------------------------------------------------------------------------------- one process


def encoded_in_parts(model, batch, size):
    """All feature rows as a group would have them, without the group: `{row index: features}`."""
    rows = {}
    for rank in range(size):
        part = BatchSharder(model.config, size, rank)(batch)
        features = []
        for modality, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if pixels in part:
                encode = getattr(model.model, f"get_{modality}_features")
                features += encode(part[pixels], part.get(f"{modality}_grid_thw"), return_dict=True).pooler_output
        indices = part["sequence_shard"].encoded_rows(rank).tolist()
        for index, own in zip(indices, torch.cat(features) if features else (), strict=True):
            assert index not in rows
            rows[index] = own
    return rows


@pytest.mark.parametrize("pools", [None, [[2, 2, 2]], [[1, 4, 4], [3, 1, 1]]])
@torch.no_grad()
def test_parts_together_encode_every_row_once(processor, pools):
    model = tiny(video_pool_sizes=pools).eval()
    processor = AutoProcessor.from_pretrained(NANO, video_pool_sizes=pools)
    rows = [*BATCHES["everything"], row("And?", video(11)), *BATCHES["videos"]]
    batch = VilaDataCollator(processor, packing=True)(rows)
    batch = pad_packed(batch, 3, 0)
    pictures = model.get_image_features(batch["pixel_values"], batch["image_grid_thw"], return_dict=True).pooler_output
    videos = model.get_video_features(batch["pixel_values_videos"], batch["video_grid_thw"], return_dict=True)
    expected = torch.cat([*pictures, *videos.pooler_output])
    rows = encoded_in_parts(model, batch, 3)
    assert sorted(rows) == list(range(len(expected)))
    torch.testing.assert_close(torch.stack([rows[i] for i in range(len(expected))]), expected, atol=1e-6, rtol=1e-5)


def test_picture_with_dynamic_s2_stays_in_one_piece(converted):
    from vila.geometry_vila import TileGrid

    config = AutoConfig.from_pretrained(converted("nvila_dynamic_s2_image"))
    (unit,) = BatchSharder(config, 2, 0).image_units(0, TileGrid(2, 3), 10)
    assert unit.tiles > 6 and unit.rows[0][0] == 10 and len(unit.rows) == 1


def test_parts_follow_each_other(batch, processor):
    batch = pad_packed(batch, 4, processor.tokenizer.pad_token_id)
    config = AutoConfig.from_pretrained(NANO)
    parts = [BatchSharder(config, 4, rank)(batch) for rank in range(4)]
    for name in ("input_ids", "position_ids"):
        assert torch.cat([part[name] for part in parts], dim=1).equal(batch[name])
    labels = torch.cat([part["shift_labels"] for part in parts], dim=1)
    assert labels[:, :-1].equal(batch["labels"][:, 1:]) and labels[0, -1] == -100
    shard: Shard = parts[0]["sequence_shard"]
    assert shard.num_labels == int((batch["labels"][:, 1:] != -100).sum())
    assert sum(shard.row_lengths) == shard.length == batch["input_ids"].shape[1]


def test_filler_is_a_row_of_its_own_that_nobody_learns(batch):
    length = batch["input_ids"].shape[1]
    padded = pad_packed(batch, length + 3, 5)
    assert padded["input_ids"].shape == padded["labels"].shape == padded["position_ids"].shape == (1, length + 3)
    assert padded["labels"][0, length:].tolist() == [-100] * 3
    assert row_lengths(padded["position_ids"]) == (*row_lengths(batch["position_ids"]), 3)
    assert pad_packed(batch, 1, 5) is batch


def test_units_are_divided_by_their_tiles():
    units = [Unit("image", number, tiles, ((0, 0),)) for number, tiles in enumerate([1, 1, 6, 1, 1, 2])]
    assert [[unit.tiles for unit in part] for part in divide(units, 2)] == [[1, 1, 6], [1, 1, 2]]
    assert [len(part) for part in divide(units[:1], 3)] == [0, 1, 0]
    assert divide([], 2) == ((), ())


@pytest.mark.parametrize(
    ("heads", "key_heads", "size", "each"),
    [(28, 4, 2, 2), (28, 4, 14, 2), (28, 4, 28, 1), (4, 2, 4, 1), (32, 8, 4, 2)],
)
def test_every_process_gets_key_heads_beside_their_query_heads(heads, key_heads, size, each):
    repeats = key_repeats(heads, key_heads, size)
    assert key_heads * repeats // size == each
    assert key_heads * repeats % size == 0 and heads % (key_heads * repeats) == 0


def test_sampler_repeats_whole_batches():
    sampler = RepeatingSampler(range(5), batch_size=2, times=2)
    assert list(sampler) == [0, 1, 0, 1, 2, 3, 2, 3] and len(sampler) == 8


def divided_trainer(processor, folder, **arguments):
    """The trainer of the first of two processes, without the other."""
    arguments = TrainingArguments(folder, use_cpu=True, report_to="none", per_device_train_batch_size=1, **arguments)
    model = tiny()
    return SequenceParallelTrainer(
        model,
        arguments,
        sequence_parallel=SimpleNamespace(size=2, sharder=BatchSharder(model.config, 2, 0)),
        data_collator=VilaDataCollator(processor, packing=True),
        train_dataset=BATCHES["everything"],
    )


def test_rows_come_in_the_order_that_is_asked_for(processor, tmp_path):
    orders = {
        strategy: list(divided_trainer(processor, tmp_path, train_sampling_strategy=strategy)._get_train_sampler())
        for strategy in ("random", "sequential")
    }
    assert orders["sequential"] == [0, 0, 1, 1, 2, 2, 3, 3] != orders["random"]
    assert sorted(orders["random"]) == orders["sequential"]
    with pytest.raises(ValueError, match="train_sampling_strategy='group_by_length'"):
        divided_trainer(processor, tmp_path, train_sampling_strategy="group_by_length")


@pytest.mark.parametrize(("rank", "share"), [(0, 3), (2, 3), (3, 1)])
def test_cache_keeps_nothing_of_what_fills_up_the_last_parts(rank, share):
    layer, is_last = SharedLayer(prompt=10, rank=rank, size=4), rank == 3
    states, new = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 2, 4)
    seen, _ = layer.update(states, states)
    assert seen is states and layer.keys.equal(states[:, :, :share]) and layer.get_seq_length() == 10
    seen, _ = layer.update(new, new)
    assert seen.shape[2] == share + (2 if is_last else 0) and layer.get_seq_length() == 12
    layer.crop(-1)
    assert layer.get_seq_length() == 11 and layer.keys.shape[2] == share + is_last
    with pytest.raises(ValueError, match="prompt"):
        layer.crop(-2)


# --------------------------------------------------------------------------------------------------------- bad input


def test_batch_that_cannot_be_divided_is_refused(batch):
    sharder = BatchSharder(AutoConfig.from_pretrained(NANO), 2, 0)
    length = batch["input_ids"].shape[1]
    odd = pad_packed(batch, length + 1 if length % 2 == 0 else length, 0)
    with pytest.raises(ValueError, match=f"{odd['input_ids'].shape[1]} ids does not divide by the group of 2"):
        sharder(odd)
    two = torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="2 rows"):
        sharder({"input_ids": two})
    with pytest.raises(ValueError, match="padding"):
        sharder({"input_ids": two[:1], "attention_mask": torch.tensor([[1, 1, 1, 0]])})
    even = pad_packed(batch, 2, 0)
    with pytest.raises(ValueError, match="image_grid_thw"):
        sharder({name: tensor for name, tensor in even.items() if name != "image_grid_thw"})
    with pytest.raises(ValueError, match="image placeholders"):
        sharder({**even, "input_ids": torch.zeros_like(even["input_ids"])})
    with pytest.raises(ValueError, match="tiles"):
        sharder({**even, "pixel_values": even["pixel_values"][1:]})


def test_group_that_does_not_fit_is_refused(processor):
    with pytest.raises(ValueError, match=r"28 attention heads .* 8 processes"):
        check_heads(28, 8)
    config = AutoConfig.from_pretrained(NANO)
    with pytest.raises(ValueError, match="no process 2"):
        BatchSharder(config, 2, 2)
    with pytest.raises(ValueError, match="packing=True"):
        ShardingCollator(VilaDataCollator(processor), BatchSharder(config, 2, 0))
    sliding = tiny()
    sliding.config.text_config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match="full attention in every layer, not sliding_attention"):
        SequenceParallel(sliding)
    sliding.config.text_config.layer_types, sliding.config.text_config.sliding_window = None, 16
    with pytest.raises(ValueError, match="full attention in every layer"):
        SequenceParallel(sliding)
    with pytest.raises(RuntimeError, match="init_process_group"):
        SequenceParallel(tiny())
