"""Every golden case of the understanding family, through `vila-convert` and the public API alone."""

import json

import pytest
import torch
from conftest import GOLDENS, GoldenCase, golden_cases
from transformers import AutoModel, AutoProcessor

TOLERANCE = 1e-4
SUPPORTED_TOWERS = ("siglip_vision_model", "clip_vision_model", "intern_vit_6b")


def unmet_needs(case: GoldenCase) -> list[str]:
    """What a case needs that the package does not have yet."""
    needs = set()
    blocks = [block for chat in case.chats for message in chat for block in message["content"]]
    if any(block["type"] == "video" for block in blocks):
        needs.add("video")
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


def encode(processor, chats, **processor_kwargs):
    return processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=processor_kwargs,
    )


def golden_pixels(case):
    names = [name for name in case.tensors if name.startswith("pixel_values.image.")]
    return [case.tensors[name] for name in sorted(names, key=lambda name: int(name.rsplit(".", 1)[1]))]


def golden_features(case):
    """Feature rows of all views as the original's encoder returned them, `(rows, hidden)`."""
    names = [name for name in case.tensors if name.startswith("encode_images_out.")]
    names.sort(key=lambda name: [int(part) for part in name.split(".")[1:]])
    return torch.cat([case.tensors[name].flatten(0, -2) for name in names])


def expected_ids(case, image_token_id):
    """Ids after splicing: the original's text segments, and each media block as placeholders and end ids."""
    ids = []
    for segment in case.golden["layout"]:
        if segment["type"] == "text":
            ids += segment["ids"]
        else:
            end = case.golden["image_end_ids"]
            ids += [image_token_id] * (segment["length"] - len(end)) + end
    return ids


@parametrize(SINGLE)
def test_case_equals_the_original(case, converted):
    model, processor = load(converted(case))
    inputs = encode(processor, case.chats[0])
    golden, tensors = case.golden, case.tensors

    assert model.config.image_token_id == golden["media_token_ids"]["image"]
    assert inputs["input_ids"].shape == (1, golden["sequence_length"])
    if "layout" in golden:
        assert inputs["input_ids"][0].tolist() == expected_ids(case, model.config.image_token_id)
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
def tokenizers(tmp_path_factory):
    """Processors of the cases that renderings name, with the chat template of a mode; towers do not matter."""
    from vila.chat_templates_vila import choose_chat_template, stop_token_ids
    from vila.conversion_vila import load_tokenizer
    from vila.image_processing_vila import VilaImageProcessor
    from vila.processing_vila import VilaProcessor

    loaded = {}

    def load_processor(name, mode):
        if (name, mode) not in loaded:
            checkpoint = GOLDENS / "vila" / name / "checkpoint"
            tokenizer = load_tokenizer(checkpoint / "llm")
            llm = json.loads((checkpoint / "llm" / "config.json").read_text())
            template = choose_chat_template(mode, tokenizer, llm["model_type"], checkpoint, {})
            processor = VilaProcessor(VilaImageProcessor(), tokenizer, chat_template=template)
            loaded[name, mode] = processor, stop_token_ids(template, tokenizer)
        return loaded[name, mode]

    return load_processor


@pytest.mark.parametrize(("conversation", "rendering"), renderings())
def test_conversation_renders_as_the_original(conversation, rendering, tokenizers):
    processor, stop_ids = tokenizers(rendering["tokenizer_of"], rendering["mode"])
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
