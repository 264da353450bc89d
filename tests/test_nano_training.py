"""examples/nano: the stream of conversations, the untrained model, training that resumes, scores and the plot."""

import copy
import json
import random
import shutil
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import build
import evaluate
import judge
import plot
import pytest
import recipe
import torch
import tower
import train
from answering import answer, score
from dataset import SIZES, TASKS, WINDOW, NanoDataset, size_of
from drawing import Thing
from fonts import font
from optimizer import MuonAdamW
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments
from vila import VilaForConditionalGeneration
from vila.training_vila import VilaDataCollator, train_only
from vocabulary import COLOURS, SHAPES


@pytest.fixture(scope="session")
def processor(small_nano):
    return AutoProcessor.from_pretrained(small_nano, trust_remote_code=True)


@pytest.fixture
def model(small_nano):
    return AutoModel.from_pretrained(small_nano, trust_remote_code=True, dtype="auto")


# ------------------------------------------------------------------------------------------------------ the model


def test_the_model_fits_into_its_file(processor):
    with torch.device("meta"):
        full = VilaForConditionalGeneration(build.build_config(processor.tokenizer))
    assert 6e6 < full.num_parameters() < 16e6 / 2
    assert full.config.num_tile_tokens == processor.num_tile_tokens == 25


def test_the_folder_brings_its_code_and_template(small_nano, processor):
    assert (small_nano / "modeling_vila.py").is_file() and (small_nano / "processing_vila.py").is_file()
    text = processor.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_printed_strings_are_read_letter_by_letter(processor):
    tokenizer = processor.tokenizer
    for text in (*judge.reading.GOODS[:3], "KLOP", "2071", "What is 4 + 19?", "It says: KLOP 7.\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for text in ("KLOP", "2071", "WUG"):
        assert len(tokenizer(text)["input_ids"]) == len(text)
    assert len(tokenizer(" circle")["input_ids"]) == len(tokenizer("milk")["input_ids"]) == 1


@pytest.mark.parametrize("task", TASKS)
def test_every_task_becomes_a_batch_that_teaches_its_answers(processor, model, task):
    dataset = NanoDataset({task: 1}, batch_size=2)
    episodes = dataset.window(0)[0]
    collator = VilaDataCollator(processor)
    for episode in episodes:
        labels = collator.encode_row({"messages": episode.messages})["labels"]
        learned = processor.tokenizer.decode(labels[labels != -100])
        assert learned == "".join(f"{turn.answer}<|im_end|>" for turn in episode.turns)
    loss = model(**collator([{"messages": episode.messages} for episode in episodes])).loss
    assert torch.isfinite(loss)


def test_views_are_those_the_tasks_are_made_for(processor):
    def tiles(trial, **options):
        chats = [episode.prompt for episode in judge.TRIALS[trial].episodes(1)]
        data = processor.apply_chat_template(
            chats, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=options
        )
        return len(data.get("pixel_values", ())), len(data.get("pixel_values_videos", ()))

    assert tiles("tiles_on") == (5, 0)
    assert tiles("tiles_on", **judge.TRIALS["tiles_off"].options) == (1, 0)
    assert tiles("read") == (1, 0) and tiles("compare") == (2, 0)
    assert tiles("receipt_steps") == (3, 0) and tiles("fewshot_4") == (5, 0)
    assert tiles("direction") == (0, 12) and tiles("text") == (0, 0)


# ----------------------------------------------------------------------------------------------------- the stream


def texts(rows):
    return [repr([message["content"][-1]["text"] for message in row["messages"]]) for row in rows]


MIXTURE = {"text": 1.0, "naming": 1.0, "fewshot": 0.5}


def test_workers_and_processes_share_the_stream_out():
    batches = 2 * WINDOW
    alone = texts(NanoDataset(MIXTURE, 3, seed=5, batches=batches))
    assert len(alone) == 3 * batches
    loader = DataLoader(
        NanoDataset(MIXTURE, 3, seed=5, batches=batches), batch_size=3, num_workers=2, collate_fn=texts
    )
    assert sorted(text for batch in loader for text in batch) == sorted(alone)
    parts = [NanoDataset(MIXTURE, 3, seed=5, batches=batches, process=p, processes=2) for p in (0, 1)]
    assert sorted(text for part in parts for text in texts(part)) == sorted(alone)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_goes_on_where_it_was(workers):
    def taken(start, count, seed=5):
        dataset = NanoDataset(MIXTURE, 3, seed=seed, start=start)
        return list(islice(DataLoader(dataset, batch_size=3, num_workers=workers, collate_fn=texts), count))

    whole = taken(0, 20)
    for start in (1, 6, WINDOW, WINDOW + 3):
        assert taken(start, 20 - start) == whole[start:]
    assert taken(0, 20, seed=6) != whole


def test_batches_hold_one_size_and_little_padding(processor):
    dataset = NanoDataset({"naming": 1, "dialogue": 1, "compare": 1}, 8)
    collator, filled = VilaDataCollator(processor), []
    for episodes in dataset.window(0):
        assert len({size_of(episode.task) for episode in episodes}) == 1
        filled.append(collator([{"messages": e.messages} for e in episodes])["attention_mask"].float().mean())
    assert sum(filled) / WINDOW > 0.85
    assert sorted(task for tasks in SIZES.values() for task in tasks) == sorted(TASKS)


def test_wrong_streams_are_refused():
    for mixture in ({"unknown": 1}, {}, {"text": 0}):
        with pytest.raises(ValueError, match="mixture"):
            NanoDataset(mixture, 2)
    with pytest.raises(ValueError, match="judge"):
        NanoDataset({"text": 1}, 2, split="test")


# ------------------------------------------------------------------------------------------------------- training


def test_the_loss_falls_in_a_plain_trainer(tmp_path, model, processor):
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=30,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=5,
        remove_unused_columns=False,
        accelerator_config={"dispatch_batches": False},
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    dataset = NanoDataset({"naming": 1, "compare": 0.3}, 8)
    trainer = Trainer(model, arguments, data_collator=VilaDataCollator(processor), train_dataset=dataset)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.6 * losses[0]


@pytest.fixture
def tiny_recipe(monkeypatch, small_nano):
    changes = {"samples": 24, "watched": ("naming",), "batch_size": 2}
    stages = [replace(stage, **changes) for stage in recipe.STAGES if stage.name != "sft"]
    monkeypatch.setattr(
        recipe, "STAGES", tuple(replace(s, mixture={"naming": 1, "text": 1} if s.mixture else {}) for s in stages)
    )
    monkeypatch.setattr(train.Monitor.__init__, "__defaults__", (2,))
    monkeypatch.setattr(build, "build", lambda folder, seed: shutil.copytree(small_nano, folder))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("stage", ["pretrain", "practice"])
def test_a_run_that_was_stopped_ends_like_one_that_was_not(tmp_path, tiny_recipe, stage):
    options = ["--threads", "1", "--workers", "0", "--output", str(tmp_path)]
    train.main(options)
    assert all(w.dtype == torch.bfloat16 for w in load_file(tmp_path / "final" / "model.safetensors").values())
    weights = load_file(tmp_path / stage / "final" / "model.safetensors")
    log = (tmp_path / "log.jsonl").read_text().splitlines()

    stopped = tmp_path / stage
    last = max(stopped.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(last)
    shutil.rmtree(stopped / "final")
    train.main(options)
    again = load_file(tmp_path / stage / "final" / "model.safetensors")
    assert all(torch.allclose(weights[name], again[name], atol=1e-3) for name in weights)
    added = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()[len(log) :]]
    assert {row["step"] for row in added} == {int(last.name.split("-")[1])}
    plot.main([str(tmp_path / "log.jsonl"), str(tmp_path / "plot.png")])
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_time_is_turned_into_steps(tmp_path, tiny_recipe, monkeypatch):
    monkeypatch.setattr(train, "seconds_per_sample", lambda *arguments: 0.5)
    options = train.parse(["--minutes", "2", "--stages", "language", "--output", str(tmp_path)])
    assert train.plan_steps(tmp_path, options, options.planned[0], None, None) == round(120 / 0.5 / 4)
    options.minutes = 50
    assert train.plan_steps(tmp_path, options, options.planned[0], None, None) == round(120 / 0.5 / 4)


def test_pace_is_measured_for_every_size(model, processor):
    stage = replace(recipe.STAGES[-1], batch_size=2, mixture={"naming": 1, "text": 3})
    paces = train.seconds_per_size(model, VilaDataCollator(processor), stage, 0)
    assert set(paces) == {"picture", "text"} and min(paces.values()) > 0


def test_ablations_change_one_thing_each():
    plain = {stage.name: stage for stage in recipe.recipe()}
    assert list(plain) == ["tower", "language", "align", "pretrain", "sft", "practice"]
    assert plain["align"].tuned == ("projector",) and plain["sft"].mixture["text"] > 0
    assert sum(stage.share for stage in plain.values()) == pytest.approx(1)
    for stage in recipe.recipe(frozen_language_model=True)[2:]:
        assert "language_model" not in stage.tuned
    pairs = recipe.recipe(pairs=True)
    assert "interleaved" not in pairs[3].mixture and "fewshot" not in pairs[3].mixture
    assert pairs[4] == plain["sft"]
    assert plain["practice"].mixture.keys() - pairs[5].mixture.keys() == {"contrast", "compare", "fewshot"}
    assert all("text" not in stage.mixture for stage in recipe.recipe(text=False)[2:])
    for stage in plain.values():
        assert set(stage.mixture) <= set(TASKS) and set(stage.watched) <= set(judge.TRIALS)


def test_labels_say_what_is_drawn_where():
    rng = random.Random(0)
    labels = tower.Labels(11)
    labels.add_things([Thing("blue", "star", 30, 80, 16), Thing("red", "star", 80, 80, 10)])
    labels.add_text((60, 10), "AB7", font("DejaVuSans.ttf", 20), line=1)
    maps = dict(zip(tower.KINDS, labels.maps))
    row, col = int(80 / 5.5), int(30 / 5.5)
    assert maps["shape"][row, col] == SHAPES.index("star") + 1
    assert maps["colour"][row, col] == list(COLOURS).index("blue") + 1 and maps["count"][row, col] == 2
    assert maps["shape"][0, 0] == 0 and not maps["shape"][:, 17:].any()
    read = [tower.CHARACTERS[number - 1] for number in dict.fromkeys(maps["character"][3]) if number]
    assert read == ["A", "B", "7"]
    assert [*dict.fromkeys(maps["place"][3])][:4] == [0, 1, 2, 3] and set(maps["line"][3]) == {0, 2}
    for _ in range(20):
        picture, drawn = tower.draw_labelled(rng, "train", 11)
        assert picture.size == (112, 112) and drawn.shape == (len(tower.KINDS), 20, 20)
        assert all(kind.max() <= number for kind, number in zip(drawn, tower.KINDS.values()))


class Echo(torch.nn.Module):
    def forward(self, pixel_values):
        return SimpleNamespace(last_hidden_state=pixel_values)


def test_matrices_of_layers_go_through_muon(model):
    trainee = train_only(copy.deepcopy(model), ("vision_tower", "projector", "language_model"))
    optimizer = MuonAdamW(trainee, 1e-2, 0.0, 0.98)
    muon, adamw = optimizer.parts
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    counts = [
        sum(weight.numel() for group in part.param_groups for weight in group["params"]) for part in (muon, adamw)
    ]
    assert sum(counts) == sum(weight.numel() for weight in trainee.parameters()) and min(counts) > 0
    before = {name: weight.detach().clone() for name, weight in trainee.named_parameters()}
    for weight in trainee.parameters():
        weight.grad = torch.randn_like(weight)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert {group["lr"] for part in optimizer.parts for group in part.param_groups} == {0.5e-2}
    optimizer.step()
    assert all((weight != before[name]).any() for name, weight in trainee.named_parameters())
    other = MuonAdamW(trainee, 1e-3, 0.0, 0.98)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["lr"] for group in other.param_groups] == [0.5e-2] * 2
    assert all(
        group is own for group, own in zip(other.param_groups, (g for p in other.parts for g in p.param_groups))
    )


def test_the_head_puts_quarters_where_they_belong(model):
    trainee = tower.TowerPretraining(model.model.vision_tower)
    rows = iter(tower.LabelledPictures(11, 2))
    batch = torch.utils.data.default_collate([next(rows) for _ in range(2)])
    output = trainee(**batch)
    assert [tuple(logit.shape[2:]) for logit in output["logits"]] == [(20, 20)] * len(tower.KINDS)
    side, patch = 10, (4, 7)
    with torch.no_grad():  # a head that only sees a mark in one patch
        trainee.norm, trainee.tower = torch.nn.Identity(), Echo()
        features = torch.zeros(1, side * side, trainee.head.in_features)
        features[0, patch[0] * side + patch[1], 0] = 1
        trainee.head.bias.zero_()
        changed = trainee(features)["logits"][0][0].abs().sum(0).nonzero().tolist()
    assert changed == [[8, 14], [8, 15], [9, 14], [9, 15]]


def test_the_stream_of_labelled_pictures_goes_on_where_it_was():
    whole = list(islice(tower.LabelledPictures(11, 2, seed=3), 8))
    rest = list(islice(tower.LabelledPictures(11, 2, seed=3, start=2), 4))
    assert all(torch.equal(one["labels"], two["labels"]) for one, two in zip(whole[4:], rest))
    loader = DataLoader(tower.LabelledPictures(11, 2, seed=3), batch_size=2, num_workers=2)
    for batch, number in zip(loader, (0, 2, 4, 6)):
        assert torch.equal(batch["pixel_values"][0], whole[number]["pixel_values"])


# --------------------------------------------------------------------------------------------------------- scores


def test_evaluate_scores_an_untrained_model_near_chance(small_nano, capsys):
    evaluate.main(["--model", str(small_nano), "--samples", "3", "--batch-size", "2", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [row["trial"] for row in report["scores"]] == list(judge.TRIALS)
    for row in report["scores"]:
        low, high = row["interval"]
        assert 0 <= low <= row["accuracy"] <= high <= 1 and row["total"] == 3
        assert 0 <= row["chance"] <= 0.5 and row["accuracy"] < 1
    evaluate.main(["--model", str(small_nano), "--samples", "2", "--trials", "naming", "text"])
    table = capsys.readouterr().out
    assert table.count("\n") == 4 and "| naming |" in table and "95 %" in table


def test_right_answers_are_counted(model, processor, monkeypatch):
    import answering

    monkeypatch.setattr(answering, "answer", lambda m, p, episodes, *rest: [e.target.answer for e in episodes])
    found = score(model, processor, "naming", 20)
    assert found.right == found.total == 20 and found.as_dict()["reached"] is True
    assert {"pair", "phrasing"} <= set(found.held_out)
    monkeypatch.setattr(answering, "answer", lambda m, p, episodes, *rest: ["no idea"] * len(episodes))
    assert score(model, processor, "naming", 20).right == 0


def test_batched_answers_equal_single_ones(model, processor):
    for trial in ("naming", "direction", "fewshot_2", "text"):
        episodes = list(judge.TRIALS[trial].episodes(3))
        together = answer(model, processor, episodes, 4)
        assert together == [answer(model, processor, [episode], 4)[0] for episode in episodes]
