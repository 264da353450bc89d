"""Evaluation harnesses need no adapter of ours: the calls of their generic ones work as they stand.

lmms-eval's `huggingface` model renders chats to text, hands media over as flat lists, passes the tokenizer's end token
and decodes what is new; its older models cut answers at `until`. VLMEvalKit's `--base-url` sends OpenAI messages.
"""

import base64
from io import BytesIO

import pytest
import torch
from conftest import COMMITTED_GOLDENS, REPOSITORY, GoldenCase
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
)

NANO = REPOSITORY / "checkpoints" / "vila-nano"
MEDIA = REPOSITORY / "examples" / "chats"
CASES = map(GoldenCase, sorted((COMMITTED_GOLDENS / "vila").iterdir()))
CONVERTED = [case for case in CASES if case.has_checkpoint]


def picture(name):
    return Image.open(MEDIA / f"{name}.jpg").convert("RGB")


def document(text, *media):
    """What a task makes of one of its rows: media first, then the question."""
    blocks = [
        {"type": "video", "video": medium} if isinstance(medium, str) else {"type": "image", "image": medium}
        for medium in media
    ]
    return [{"role": "user", "content": [*blocks, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def documents():
    return [
        document("Tell me which thing is in the picture.", picture("naming_0")),
        document("Where are more triangles?", picture("compare_0"), picture("compare_1")),
        document("What is one plus one?"),
        document("Which way does it move?", str(MEDIA / "direction_0.mp4")),
        document("Write the total with all steps, slowly and in full.", picture("receipt_steps_0")),
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(NANO, trust_remote_code=True)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(NANO, trust_remote_code=True)


@pytest.fixture(scope="module")
def model():
    return AutoModel.from_pretrained(NANO, trust_remote_code=True, dtype="float32", device_map="cpu").eval()


def encode(processor, chats):
    """Chats -> inputs, as lmms-eval's `huggingface` model makes them."""
    texts = [processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    blocks = [block for chat in chats for message in chat for block in message["content"]]
    images = [block["image"] for block in blocks if block["type"] == "image"]
    videos = [block["video"] for block in blocks if block["type"] == "video"]
    return processor(text=texts, padding=True, return_tensors="pt", images=images, videos=videos, audios=[])


def answer(model, processor, tokenizer, chats, **options):
    """Chats -> answers and their ids, as it generates and decodes them."""
    inputs = encode(processor, chats).to(torch.device("cpu"))
    if "stop_strings" in options:
        options["tokenizer"] = tokenizer
    options = {"max_new_tokens": 24, "do_sample": False, "temperature": None, "top_p": None, "num_beams": 1} | options
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    output = model.generate(**inputs, **ends, use_cache=True, **options)
    new = [row[len(ids) :] for ids, row in zip(inputs.input_ids, output)]
    return processor.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False), new


def cut(text, until):
    """What is left of an answer in front of the first stop string."""
    return text[: min([text.index(stop) for stop in until if stop in text], default=len(text))]


# ------------------------------------------------------------------------------------------------- lmms-eval


def test_the_class_is_found_as_the_adapter_looks_for_it():
    config = AutoConfig.from_pretrained(NANO, trust_remote_code=True)
    classes = (AutoModelForCausalLM, AutoModelForImageTextToText)
    found = next((known for known in classes if config.model_type in known._model_mapping.keys()), AutoModel)  # noqa: SIM118
    loaded = found.from_pretrained(NANO, trust_remote_code=True, torch_dtype="bfloat16", device_map="cpu")
    assert loaded.can_generate() and loaded.dtype == torch.bfloat16


def test_its_answers_are_those_of_the_six_lines(model, processor, tokenizer, documents):
    for chat in documents:
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
        assert answer(model, processor, tokenizer, [chat])[0] == [processor.decode(ids, skip_special_tokens=True)]


def test_a_batch_is_padded_on_the_left_and_answers_as_one_by_one(model, processor, tokenizer, documents):
    mask = encode(processor, documents)["attention_mask"]
    assert mask[:, -1].all() and not mask[:, 0].all()
    together, _ = answer(model, processor, tokenizer, documents)
    assert together == [answer(model, processor, tokenizer, [chat])[0][0] for chat in documents]
    assert any(together)


def test_a_batch_without_any_media_is_answered(model, processor, tokenizer):
    chats = [document("What is one plus one?"), document("Is three more than two, or is it not?")]
    assert len(answer(model, processor, tokenizer, chats)[0]) == 2


def test_beams_and_sampling_of_a_batch(model, processor, tokenizer, documents):
    assert len(answer(model, processor, tokenizer, documents, num_beams=2)[0]) == len(documents)
    sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    assert len(answer(model, processor, tokenizer, documents, **sampled)[0]) == len(documents)


def test_stop_strings_end_rows_where_cutting_would(model, processor, tokenizer, documents):
    """`until` of a task: cutting decoded answers and `generate(stop_strings=...)` agree, in a padded batch too."""
    free, ids = answer(model, processor, tokenizer, documents)
    longest = max(range(len(free)), key=lambda row: len(free[row]))
    until = [free[longest][len(free[longest]) // 2 :][:2]]
    stopped, stopped_ids = answer(model, processor, tokenizer, documents, stop_strings=until)
    assert [cut(text, until) for text in stopped] == [cut(text, until) for text in free]

    def written(row):
        return int((row != tokenizer.pad_token_id).sum())

    assert written(stopped_ids[longest]) < written(ids[longest])
    untouched = [row for row, text in enumerate(free) if until[0] not in text]
    assert [stopped[row] for row in untouched] == [free[row] for row in untouched]


@pytest.mark.parametrize("case", CONVERTED, ids=lambda case: case.name)
def test_rendered_text_gives_the_ids_of_the_chat(case, converted):
    """With BOS, control tokens and line breaks of every chat template."""
    processor = AutoProcessor.from_pretrained(converted(case))
    (chat,) = case.chats[:1]
    for message in chat:
        for block in message["content"]:
            if block["type"] == "image":
                block["image"] = Image.open(block.pop("path"))
    wanted = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    inputs = encode(processor, [chat])
    assert inputs["input_ids"].tolist() == wanted["input_ids"].tolist()
    torch.testing.assert_close(inputs["pixel_values"], wanted["pixel_values"])


@pytest.mark.parametrize("case", CONVERTED, ids=lambda case: case.name)
def test_the_tokenizers_end_token_ends_answers_but_those_of_llama_3(case, converted):
    """The adapter stops at that token alone; original Llama-3 checkpoints end turns with another one."""
    folder = converted(case)
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    is_enough = ends == [AutoTokenizer.from_pretrained(folder).eos_token_id]
    assert is_enough == (case.prompt["conv_mode"] != "llama_3")


# ------------------------------------------------------------------------------------------------- VLMEvalKit


def openai_content(parts):
    """Parts of a VLMEvalKit message -> those that it sends to an OpenAI server: pictures as JPEG data URIs."""
    content = []
    for part in parts:
        if part["type"] == "text":
            content.append({"type": "text", "text": part["value"]})
            continue
        buffer = BytesIO()
        Image.open(part["value"]).convert("RGB").save(buffer, format="JPEG")
        url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        content.append({"type": "image_url", "image_url": {"url": url}})
    return content


def test_openai_messages_of_the_harness_are_read_under_the_servers_policy(model, processor, tokenizer):
    parts = [
        {"type": "image", "value": str(MEDIA / "compare_0.jpg")},
        {"type": "text", "value": "This is the first. And"},
        {"type": "image", "value": str(MEDIA / "compare_1.jpg")},
        {"type": "text", "value": "Where are more triangles?"},
    ]
    chat = [{"role": "user", "content": openai_content(parts)}]
    inputs = processor.apply_chat_template(
        chat,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"media_policy": "server"},
    )
    pictures = [
        Image.open(BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1])))
        for part in chat[0]["content"]
        if part["type"] == "image_url"
    ]
    blocks = [
        {"type": "image", "image": pictures[0]},
        {"type": "text", "text": "This is the first. And"},
        {"type": "image", "image": pictures[1]},
        {"type": "text", "text": "Where are more triangles?"},
    ]
    wanted = encode(processor, [[{"role": "user", "content": blocks}]])
    assert inputs["input_ids"].tolist() == wanted["input_ids"].tolist()
    assert torch.equal(inputs["pixel_values"], wanted["pixel_values"])
    assert model.generate(**inputs, max_new_tokens=4).shape[1] > inputs["input_ids"].shape[1]
