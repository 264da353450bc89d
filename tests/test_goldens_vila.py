"""Every golden case of the understanding family, through `vila-convert` and the public API alone."""

import json

import pytest
import torch
from chat_requests import encode
from conftest import GOLDENS, GoldenCase, golden_cases
from transformers import AutoModel, AutoProcessor
from vila.conversion_vila import convert

TOLERANCE = 1e-4
SUPPORTED_TOWERS = ("siglip_vision_model", "clip_vision_model", "intern_vit_6b")


def unmet_needs(case: GoldenCase) -> list[str]:
    """What a case needs that the package does not have yet."""
    needs = set()
    tower = json.loads((case.folder / "checkpoint" / "vision_tower" / "config.json").read_text())["model_type"]
    if tower not in SUPPORTED_TOWERS:
        needs.add(f"tower {tower}")
    return sorted(needs)


def parametrize(cases):
    marked = []
    for case in cases:
        needs = unmet_needs(case)
        marks = [pytest.mark.xfail(reason="needs " + ", ".join(needs), strict=True)] if needs else []
        marked.append(pytest.param(case, id=case.name, marks=marks))
    return pytest.mark.parametrize("case", marked)


CASES = golden_cases()
SINGLE = [case for case in CASES if "batch" not in case.prompt]
BATCHES = [case for case in CASES if "batch" in case.prompt]


def load(folder):
    return (
        AutoModel.from_pretrained(folder, dtype="float32").eval(),
        AutoProcessor.from_pretrained(folder),
    )


def golden_pixels(case, modality="image"):
    names = [name for name in case.tensors if name.startswith(f"pixel_values.{modality}.")]
    return [case.tensors[name] for name in sorted(names, key=lambda name: int(name.rsplit(".", 1)[1]))]


def golden_features(case):
    """Feature rows of all views as the original's encoder returned them, `(rows, hidden)`."""
    names = [name for name in case.tensors if name.startswith("encode_images_out.")]
    names.sort(key=lambda name: [int(part) for part in name.split(".")[1:]])
    return torch.cat([case.tensors[name].flatten(0, -2) for name in names])


def check_ids(case, ids, num_video_features):
    """The original's text segments as they are; of each media block the features and the ids around them."""
    golden = case.golden
    for segment in golden["layout"]:
        block = ids[segment["start"] : segment["start"] + segment["length"]]
        if segment["type"] == "text":
            assert block == segment["ids"]
        elif segment["name"] == "image":
            end = golden["image_end_ids"]
            assert block == [golden["media_token_ids"]["image"]] * (segment["length"] - len(end)) + end
        else:
            assert block.count(golden["media_token_ids"]["video"]) == num_video_features


@parametrize(SINGLE)
def test_case_equals_the_original(case, converted):
    model, processor = load(converted(case))
    golden, tensors = case.golden, case.tensors
    if "video" in golden.get("media_shapes", {}):
        processor.video_as_images = False  # of a basic video encoder no key of an original config speaks
    inputs = encode(processor, case.chats[0])

    assert model.config.image_token_id == golden["media_token_ids"]["image"]
    assert inputs["input_ids"].shape == (1, golden["sequence_length"])
    num_video_features = 0
    if videos := golden_pixels(case, "video"):
        assert torch.equal(inputs["pixel_values_videos"], torch.cat(videos))
        output = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
        num_video_features = sum(map(len, output.pooler_output))
        if model.config.video_pool_sizes is None:
            torch.testing.assert_close(torch.cat(output.pooler_output), golden_features(case), atol=TOLERANCE, rtol=0)
    if "layout" in golden:
        check_ids(case, inputs["input_ids"][0].tolist(), num_video_features)
    if pixels := golden_pixels(case):
        assert torch.equal(inputs["pixel_values"], torch.stack(pixels))
        output = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        if any(name.startswith("encode_images_out.") for name in tensors):
            torch.testing.assert_close(torch.cat(output.pooler_output), golden_features(case), atol=TOLERANCE, rtol=0)
    with torch.no_grad():
        logits = model(**inputs).logits
    torch.testing.assert_close(logits[..., : golden["llm_vocab_rows"]], tensors["logits"], atol=TOLERANCE, rtol=0)

    new_ids = model.generate(**inputs, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :].tolist()
    assert new_ids == golden["greedy_ids"]
    if "greedy_text" in golden:
        assert processor.decode(new_ids, skip_special_tokens=True) == golden["greedy_text"]


@parametrize(BATCHES)
def test_batch_equals_the_original_and_its_single_rows(case, converted):
    """The original cuts no tiles where a batch has several pictures, hence `max_tiles=1`."""
    model, processor = load(converted(case))
    inputs = encode(processor, case.chats, max_tiles=1)
    golden, tensors = case.golden, case.tensors

    assert torch.equal(inputs["pixel_values"], torch.stack(golden_pixels(case)))
    assert inputs["attention_mask"].tolist() == golden["left_attention_mask"]
    with torch.no_grad():
        batch_logits = model(**inputs).logits
    generated = model.generate(**inputs, max_new_tokens=16, eos_token_id=[])[:, inputs["input_ids"].shape[1] :]
    assert generated.tolist() == golden["batch_left_pad_greedy_ids_no_stop"]
    for row, (chat, sample) in enumerate(zip(case.chats, golden["per_sample"])):
        length = sample["sequence_length"]
        single = encode(processor, chat, max_tiles=1)
        assert single["input_ids"][0].tolist() == inputs["input_ids"][row, -length:].tolist()
        torch.testing.assert_close(
            batch_logits[row, -length:], tensors[f"logits_single.{row}"][0], atol=TOLERANCE, rtol=0
        )
        alone = model.generate(**single, max_new_tokens=16, eos_token_id=[])[0, length:].tolist()
        assert alone == sample["greedy_ids_no_stop"] == generated[row].tolist()


CONVERSATIONS = GOLDENS / "vila" / "conversations" / "golden.json"


def renderings():
    if not CONVERSATIONS.is_file():
        return []
    golden = json.loads(CONVERSATIONS.read_text())
    return [
        pytest.param(
            golden["conversations"][rendering["conversation"]],
            rendering,
            id=f"{rendering['mode']}-{rendering['conversation']}-{number}",
        )
        for number, rendering in enumerate(golden["renderings"])
    ]


@pytest.fixture(scope="session")
def with_template(tmp_path_factory):
    """Processor and stop ids of a case that is converted with a template of another mode."""
    loaded = {}

    def load_processor(name, mode):
        if (name, mode) not in loaded:
            target = tmp_path_factory.mktemp("templates") / f"{name}_{mode}"
            convert(GOLDENS / "vila" / name / "checkpoint", target, conv_mode=mode)
            stop_ids = json.loads((target / "generation_config.json").read_text())["eos_token_id"]
            loaded[name, mode] = AutoProcessor.from_pretrained(target), stop_ids
        return loaded[name, mode]

    return load_processor


@pytest.mark.parametrize(("conversation", "rendering"), renderings())
def test_conversation_renders_as_the_original(conversation, rendering, with_template):
    processor, stop_ids = with_template(rendering["tokenizer_of"], rendering["mode"])
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in conversation]
    if rendering["no_system_prompt"]:
        messages.insert(0, {"role": "system", "content": ""})
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=rendering["add_generation_prompt"], tokenize=True, return_dict=True
    )
    assert inputs["input_ids"][0] == rendering["input_ids"]
    stop_tokens = [processor.tokenizer.decode([token]) for token in stop_ids]
    assert sorted(stop_tokens) == sorted(rendering["stop_tokens"])


TRAINING = GoldenCase(GOLDENS / "vila" / "nvila_training")
needs_training_golden = pytest.mark.skipif(not TRAINING.folder.is_dir(), reason="the case nvila_training is absent")


@pytest.fixture(scope="module")
def training_checkpoint(tmp_path_factory):
    from vila.conversion_vila import convert

    return convert(TRAINING.folder / "checkpoint", tmp_path_factory.mktemp("training") / "converted")


def training_row(conversation, no_system_prompt=False):
    """A conversation of the golden as a row; its `<image>` is the case's picture."""
    messages = [{"role": "system", "content": ""}] if no_system_prompt else []
    for turn in conversation:
        before, *after = turn["value"].split("<image>")
        content = [{"type": "text", "text": before}]
        for text in after:
            content += [{"type": "image", "path": str(TRAINING.folder / "input.png")}, {"type": "text", "text": text}]
        messages.append({"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": content})
    return {"messages": messages}


def collate(folder, rows, **options):
    """The original shows the case's picture as a single view."""
    from vila.training_vila import VilaDataCollator

    return VilaDataCollator(AutoProcessor.from_pretrained(folder), processor_kwargs={"max_tiles": 1}, **options)(rows)


@needs_training_golden
@pytest.mark.parametrize("number", range(4))
def test_training_labels_equal_the_original(number, training_checkpoint):
    golden = TRAINING.golden
    example = golden["examples"][number]
    conversation = golden["conversations"][example["conversation"]]
    batch = collate(training_checkpoint, [training_row(conversation, example["no_system_prompt"])])
    image = AutoModel.from_pretrained(training_checkpoint).config.image_token_id
    # the original has one id for the picture, then its features and a line break take its place
    block = len(batch["input_ids"][0]) - len(example["input_ids"]) + 1
    end = batch["input_ids"][0].tolist().index(image) + block if image in example["input_ids"] else 0
    ids, labels = [], []
    for token, label in zip(example["input_ids"], example["labels"]):
        ids += [image] * (block - 1) + [batch["input_ids"][0, end - 1].item()] if token == image else [token]
        labels += [-100] * block if token == image else [label]
    assert batch["input_ids"][0].tolist() == ids
    assert batch["labels"][0].tolist() == labels


@needs_training_golden
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packing", [False, True])
def test_training_loss_equals_the_original(packing, attention, training_checkpoint):
    """The stated losses are over all embedding rows of the original, three random ones that it adds at load included:
    what they differ by is what the golden's own logits, which leave these rows out, differ by."""
    golden, tensors = TRAINING.golden, TRAINING.tensors
    rows = [training_row(conversation) for conversation in golden["conversations"]]
    batch = collate(training_checkpoint, rows, packing=packing)
    model = AutoModel.from_pretrained(training_checkpoint, dtype="float32", attn_implementation=attention).train()
    with torch.no_grad():
        output = model(**batch)

    columns = tensors["logits"].shape[-1]
    mask = tensors["attention_mask"].bool()
    expected = torch.nn.functional.cross_entropy(
        tensors["logits"][:, :-1].reshape(-1, columns), tensors["labels"][:, 1:].flatten()
    )
    stated = golden["loss_packed_expected" if packing else "loss_unpacked_batch"]
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-5)
    # the original grows the table by the media tokens, with rows around the mean of the others, before it trains
    rows_after_load = golden.get("embedding_rows_after_load", columns + 3)
    model.resize_token_embeddings(rows_after_load, mean_resizing=True)
    with torch.no_grad():
        assert model(**batch).loss.item() == pytest.approx(stated, rel=TOLERANCE)
    if packing:  # the original ends the row with a dummy token
        assert torch.equal(batch["labels"], tensors["packed_labels"][:, :-1])
        assert torch.equal(batch["position_ids"], tensors["packed_position_ids"][:, :-1].long())
        logits, golden_logits = output.logits[0], tensors["logits"][mask]
    else:
        assert torch.equal(batch["labels"], tensors["labels"])
        assert torch.equal(batch["attention_mask"], tensors["attention_mask"].long())
        logits, golden_logits = output.logits[mask], tensors["logits"][mask]
    torch.testing.assert_close(logits, golden_logits, atol=TOLERANCE, rtol=0)


@needs_training_golden
@pytest.mark.parametrize("std", [1.0, 2.5])
def test_soft_time_loss_equals_the_original(std):
    from vila.loss_vila import soft_time_loss

    golden, tensors = TRAINING.golden["soft_ce"], TRAINING.tensors
    loss = soft_time_loss(tensors["soft_ce.logits"], tensors["soft_ce.labels"], golden["soft_tokens"], std)
    assert loss.item() == pytest.approx(golden[f"std={std}"], abs=1e-5)


def test_position_embeddings_are_resized_as_the_original_does():
    from safetensors.torch import load_file
    from vila.training_vila import resize_position_embeddings

    tensors = load_file(CONVERSATIONS.with_name("golden.safetensors"))
    expected = tensors["position_embedding.after_98px"]
    resized = resize_position_embeddings(tensors["position_embedding.before"], len(expected))
    torch.testing.assert_close(resized, expected, atol=1e-6, rtol=0)
    assert not resized[::2].any()  # the original's rule leaves nothing where old and new positions coincide
