"""JSON answers of models with random weights, which left alone write noise."""

import json
from enum import Enum
from typing import Annotated

import pytest
import torch
from pydantic import BaseModel, Field
from vila.structured_output_vila import JsonLogitsProcessor, json_processors


class Kind(Enum):
    CAT = "cat"
    DOG = "dog"


class Animal(BaseModel, extra="forbid"):
    kind: Kind
    legs: Annotated[int, Field(ge=0, le=99)]
    names: Annotated[list[Annotated[str, Field(max_length=3)]], Field(max_length=2)]


LITE, LLAMA_3 = "nvila_lite_image", "vila15_llama3_image"
# Qwen's tokenizer, sentencepiece with byte fallback, and one whose answers end with either of two tokens
CASES = [LITE, "vila15_image", LLAMA_3]
WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 2.0},
    "beams": {"num_beams": 3},
    "sampled_beams": {"num_beams": 3, "do_sample": True},
}
CHATS = [[{"role": "user", "content": text}] for text in ("hi", "Tell me about 42.", "x y")]


def prepare(processor, chats=CHATS):
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(chats, **options)


def answers(model, processor, chats=CHATS, **options):
    torch.manual_seed(0)
    inputs = prepare(processor, chats)
    ids = model.generate(**inputs, max_new_tokens=300, **options)[:, inputs["input_ids"].shape[1] :]
    return ids, processor.batch_decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_answers_obey_the_schema(case, way, load):
    model, processor = load(case)
    processors = json_processors(model, processor, Animal)
    ids, texts = answers(model, processor, logits_processor=processors, **WAYS[way])
    for text in texts:
        Animal.model_validate_json(text)
    # the same processor serves another call, and a batch of another size
    again, _ = answers(model, processor, logits_processor=processors, **WAYS[way])
    assert torch.equal(ids, again)
    (single,) = answers(model, processor, CHATS[:1], logits_processor=processors, **WAYS[way])[1]
    Animal.model_validate_json(single)


def test_rows_end_at_different_steps_and_equal_single_answers(load):
    model, processor = load("vila15_image")
    rows = [[{"role": "user", "content": "word " * length}] for length in (1, 9, 30)]
    ids, texts = answers(model, processor, rows, logits_processor=json_processors(model, processor, Animal))
    ends = {int((row != processor.tokenizer.pad_token_id).sum()) for row in ids}
    assert len(ends) > 1
    for row, text in zip(rows, texts):
        single = answers(model, processor, [row], logits_processor=json_processors(model, processor, Animal))[1]
        assert single == [text]


def test_speculative_decoding_writes_the_same(load):
    model, processor = load(LITE)
    plain = answers(model, processor, CHATS[:1], logits_processor=json_processors(model, processor, Animal))
    guessed = answers(
        model,
        processor,
        CHATS[:1],
        logits_processor=json_processors(model, processor, Animal),
        prompt_lookup_num_tokens=3,
    )
    assert guessed[1] == plain[1]


def walk(processor, tokenizer, wanted, width):
    """Feeds a text token by token; returns the tokens that may follow it, or None if one was not allowed."""
    ids = torch.tensor([[1, 2, 3]])
    for token in [*tokenizer.encode(wanted, add_special_tokens=False), None]:
        allowed = processor(ids, torch.zeros(1, width))[0].isfinite()
        if token is None:
            return allowed.nonzero().flatten().tolist()
        if not allowed[token]:
            return None
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


@pytest.mark.parametrize("extra", [-3, 0, 61])
def test_logits_of_any_width(extra, load):
    """Some tables lack the media tokens' rows, others are padded: padding is never allowed, and stop tokens are."""
    model, processor = load(LLAMA_3)
    stop, width = model.generation_config.eos_token_id, len(processor.tokenizer) + extra
    assert len(stop) == 2 and model.config.text_config.vocab_size == len(processor.tokenizer) - 3
    logits_processor = JsonLogitsProcessor(processor.tokenizer, stop, Animal)
    assert walk(logits_processor, processor.tokenizer, '{"kind": "cat", "legs": 4, "names": []}', width) == stop
    within = walk(logits_processor, processor.tokenizer, '{"kind": "cat", "legs": 4, "names": ["', width)
    assert within and max(within) < len(processor.tokenizer) and not set(stop) & set(within)


@pytest.mark.parametrize(
    ("text", "legal"),
    [
        ('{"a": [1, 2.5, null, true, "é"], "b": {}}', True),
        ('{\n  "a": [\n    1\n  ]\n}', True),
        ("[]", True),
        ("3", False),
        ("Sure: {}", False),
        ("{'a': 1}", False),
        ('{"a":  1}', False),  # more than one blank in a line
    ],
)
def test_any_json_is_an_object_or_an_array(text, legal, load):
    _, processor = load("vila15_intern_image")
    tokenizer = processor.tokenizer
    allowed = walk(JsonLogitsProcessor(tokenizer, [tokenizer.eos_token_id]), tokenizer, text, len(tokenizer))
    assert allowed == ([tokenizer.eos_token_id] if legal else None)


def test_control_tokens_cannot_be_written_inside_strings(load):
    _, processor = load(LITE)
    tokenizer = processor.tokenizer
    allowed = walk(JsonLogitsProcessor(tokenizer, [tokenizer.eos_token_id]), tokenizer, '{"a": "b', len(tokenizer))
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert len(allowed) > 100 and not special & set(allowed)


def test_a_continued_chat_is_a_new_answer(load):
    model, processor = load(LITE)
    processors = json_processors(model, processor, Animal)
    _, (first,) = answers(model, processor, CHATS[:1], logits_processor=processors)
    turn = [{"role": "assistant", "content": first}, {"role": "user", "content": "And again?"}]
    _, (second,) = answers(model, processor, [CHATS[0] + turn], logits_processor=processors)
    Animal.model_validate_json(second)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "nonsense"}, "nonsense"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"enum": []}, "Unsatisfiable"),
        ("{}", "dictionary or a pydantic class, got str"),
        ({"const": float}, "no JSON"),
    ],
)
def test_schemas_that_cannot_be_followed(schema, message, load):
    _, processor = load(LITE)
    with pytest.raises(ValueError, match=message):
        JsonLogitsProcessor(processor.tokenizer, [0], schema)


def test_missing_library_is_named(load, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    _, processor = load(LITE)
    with pytest.raises(ValueError, match=r"vila-hf\[json\]"):
        JsonLogitsProcessor(processor.tokenizer, [0])


def test_a_json_schema_of_a_pydantic_class_equals_the_class(load):
    model, processor = load(LITE)
    schema = json.loads(json.dumps(Animal.model_json_schema()))
    first, second = (json_processors(model, processor, given) for given in (Animal, schema))
    texts = answers(model, processor, logits_processor=first)[1]
    assert texts == answers(model, processor, logits_processor=second)[1]
