"""`generate()`: every way of decoding gives the tokens of plain greedy decoding, and pictures are encoded once."""

import threading
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from chat_requests import assert_same, said
from generation_requests import (
    CHECKPOINTS,
    CONTINUATIONS,
    GREEDY,
    MIXED,
    NEW_TOKENS,
    ONE,
    TEXT,
    TILING,
    TWO,
    Loaded,
    answer,
    dynamic_cache,
    static_cache,
)
from transformers import MaxTimeCriteria, StoppingCriteria, StoppingCriteriaList, TextStreamer
from transformers.generation.streamers import BaseStreamer
from vila.modeling_vila import VilaForConditionalGeneration


@pytest.fixture(scope="module")
def loaded(converted):
    """`loaded(checkpoint)`, each loaded once for all tests of this file."""
    return lru_cache(maxsize=None)(lambda checkpoint: Loaded(converted(checkpoint)))


def argmax_step_by_step(case, inputs):
    """Greedy decoding written out: the whole sequence through the model for every token, no cache, no `generate`."""
    inputs, steps = dict(inputs), []
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            steps.append(case.model(**inputs).logits[:, -1])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], steps[-1].argmax(-1, keepdim=True)], dim=1)
        inputs["attention_mask"] = F.pad(inputs["attention_mask"], (0, 1), value=1)
    return torch.stack(steps, dim=1)


# ---- one answer, many ways to decode it


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("chat", [TEXT, ONE, TWO, MIXED], ids=["text", "one", "two", "batch"])
def test_greedy_equals_argmax_step_by_step(loaded, checkpoint, chat):
    case = loaded(checkpoint)
    inputs = case.encode(chat)
    assert_same(case.logits(inputs), argmax_step_by_step(case, inputs))


DECODING = {
    "no cache": lambda case: {"use_cache": False},
    "given dynamic cache": lambda case: {"past_key_values": dynamic_cache(case)},
    "static cache": lambda case: {"cache_implementation": "static"},
    "given static cache": lambda case: {"past_key_values": static_cache(case)},
    "prefill in chunks of 7": lambda case: {"prefill_chunk_size": 7},
    "prefill in chunks of 1": lambda case: {"prefill_chunk_size": 1},
    "several kept positions": lambda case: {"logits_to_keep": 3},
}
SINGLE_ROW_DECODING = {
    "prompt lookup": lambda case: {"prompt_lookup_num_tokens": 3},
    "assistant": lambda case: {"assistant_model": case.model},
}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("way", DECODING)
def test_ways_of_decoding_agree_on_a_mixed_batch(loaded, checkpoint, way):
    case = loaded(checkpoint)
    inputs = case.encode(MIXED)
    assert_same(case.logits(inputs, **DECODING[way](case)), case.logits(inputs))


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("way", SINGLE_ROW_DECODING)
@pytest.mark.parametrize("chat", [TEXT, ONE, TWO], ids=["text", "one", "two"])
def test_speculative_decoding_agrees_with_greedy(loaded, checkpoint, way, chat):
    case = loaded(checkpoint)
    inputs = case.encode(chat)
    assert_same(case.logits(inputs, **SINGLE_ROW_DECODING[way](case)), case.logits(inputs))


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_prompt_lookup_proposes_no_placeholder(loaded, checkpoint):
    """The prompt ends like the text before its picture, so that the look-up finds the placeholders behind it."""
    case = loaded(checkpoint)
    inputs = case.encode(ONE)
    ids = inputs["input_ids"]
    start = int((ids[0] == case.model.config.image_token_id).nonzero()[0])
    inputs["input_ids"] = torch.cat([ids, ids[:, start - 2 : start]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    assert_same(case.logits(inputs, prompt_lookup_num_tokens=3), case.logits(inputs))


@pytest.mark.parametrize("checkpoint", TILING)
def test_pictures_in_the_cache_need_not_be_passed_again(loaded, checkpoint):
    case = loaded(checkpoint)
    first, second = CONTINUATIONS["new text"]
    cache = dynamic_cache(case)
    answer(case, case.encode(first), "It is blue", cache)
    whole = case.encode([*first, said("It is blue"), *second])
    text = {name: whole[name] for name in ("input_ids", "attention_mask")}
    assert_same(case.logits(text, past_key_values=cache), case.logits(whole))


@pytest.mark.parametrize("checkpoint", TILING)
def test_an_assistant_with_other_weights_does_not_change_the_answer(loaded, checkpoint):
    case = loaded(checkpoint)
    torch.manual_seed(0)
    assistant = VilaForConditionalGeneration(case.model.config).eval()
    inputs = case.encode(TWO)
    assert_same(case.logits(inputs, assistant_model=assistant), case.logits(inputs))


def best_beam(case, inputs, num_beams):
    """Beam search of one row written out: tokens, and log-probability per new token."""
    beams = [(inputs["input_ids"], 0.0)]
    for _ in range(NEW_TOKENS):
        candidates = []
        for ids, score in beams:
            row = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with torch.no_grad():
                log_probabilities = case.model(**row).logits[0, -1].log_softmax(-1)
            for value, token in zip(*log_probabilities.topk(num_beams)):
                candidates.append((torch.cat([ids, token.reshape(1, 1)], dim=1), score + value.item()))
        beams = sorted(candidates, key=lambda candidate: -candidate[1])[:num_beams]
    ids, score = beams[0]
    return ids[0, -NEW_TOKENS:].tolist(), score / NEW_TOKENS


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("num_beams", [2, 3])
@pytest.mark.parametrize("chats", [MIXED, [TWO, TEXT, ONE]], ids=["text first", "text between"])
def test_beam_search_gives_every_row_of_a_batch_its_own_pictures(loaded, checkpoint, num_beams, chats):
    case = loaded(checkpoint)
    output = case.run(case.encode(chats), num_beams=num_beams, output_scores=True)
    for ids, score, chat in zip(output.sequences, output.sequences_scores, chats):
        tokens, expected = best_beam(case, case.encode(chat), num_beams)
        assert ids[-NEW_TOKENS:].tolist() == tokens
        assert score.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_returned_sequences_of_a_batch_see_the_pictures_of_their_row(loaded, checkpoint):
    """With a single candidate left, sampling has to give the greedy answer in every returned sequence."""
    case = loaded(checkpoint)
    inputs = case.encode(MIXED)
    sampled = case.logits(inputs, do_sample=True, top_k=1, num_return_sequences=3)
    assert_same(sampled, case.logits(inputs).repeat_interleave(3, dim=0))


def test_sampling_depends_on_the_seed_only(loaded):
    case = loaded("nvila_lite_image")
    inputs = case.encode(MIXED)

    def sample(seed):
        torch.manual_seed(seed)
        return case.generate(inputs, do_sample=True, temperature=5.0, num_return_sequences=2)

    assert torch.equal(sample(1), sample(1)) and not torch.equal(sample(1), sample(2))


# ---- options that look at the prompt's ids, placeholders included

PROMPT_OPTIONS = {
    "repetition_penalty": {"repetition_penalty": 1.3},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "no_repeat_ngram_size 2": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[5], [6, 7]]},
    "sequence bias": {"sequence_bias": [[[5], -2.0]]},
    "minimal length": {"min_new_tokens": 4},
    "top p": {"do_sample": True, "top_p": 1e-6},
    "beams with penalty": {"repetition_penalty": 1.3, "num_beams": 2},
    "chunks with penalty": {"repetition_penalty": 1.3, "prefill_chunk_size": 5},
}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("option", PROMPT_OPTIONS)
def test_options_that_read_the_prompt_accept_placeholders_beyond_the_vocabulary(loaded, checkpoint, option):
    case = loaded(checkpoint)
    assert case.model.config.image_token_id >= case.model.config.text_config.vocab_size
    inputs = case.encode(MIXED)
    tokens = case.generate(inputs, **PROMPT_OPTIONS[option])
    assert tokens.shape == (3, NEW_TOKENS) and tokens.max() < case.model.config.text_config.vocab_size


def test_repetition_penalty_lowers_the_tokens_of_the_prompt_and_the_answer(loaded):
    case = loaded("nvila_lite_image")
    inputs = case.encode(ONE)
    penalised = case.generate(inputs, repetition_penalty=1e6, max_new_tokens=1)
    with torch.no_grad():
        scores = case.model(**inputs).logits[0, -1]
    seen = inputs["input_ids"][inputs["input_ids"] < len(scores)].unique()
    scores[seen] = torch.where(scores[seen] < 0, scores[seen] * 1e6, scores[seen] / 1e6)
    assert penalised.item() == scores.argmax().item()


# ---- outputs on the way, and when to stop


def test_scores_are_the_logits_of_every_new_token(loaded):
    case = loaded("nvila_lite_image")
    inputs = case.encode(TWO)
    output = case.run(inputs, output_scores=True)
    with torch.no_grad():
        whole = {**inputs, "input_ids": output.sequences, "attention_mask": torch.ones_like(output.sequences)}
        expected = case.model(**whole).logits[0, -NEW_TOKENS - 1 : -1]
    assert_same(torch.cat(output.logits), expected)
    assert_same(torch.cat(output.scores), expected)


def test_streamer_gets_the_text_of_the_answer(loaded, capsys):
    case = loaded("nvila_lite_image")
    inputs = case.encode(ONE)
    capsys.readouterr()
    answer = case.generate(inputs, streamer=TextStreamer(case.processor.tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.rstrip("\n") == case.processor.decode(answer[0]).rstrip("\n")


class StopAfter(StoppingCriteria):
    """True for a row as soon as it holds `length` tokens."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_stopping_criteria_end_the_answer(loaded):
    case = loaded("nvila_lite_image")
    inputs = case.encode(ONE)
    stop = StoppingCriteriaList([StopAfter(inputs["input_ids"].shape[1] + 3), MaxTimeCriteria(60.0)])
    assert torch.equal(case.generate(inputs, stopping_criteria=stop), case.generate(inputs)[:, :3])


def test_stop_tokens_of_the_checkpoint_end_a_row_and_pad_it(loaded):
    case = loaded("nvila_lite_image")
    inputs = case.encode(MIXED)
    free = case.generate(inputs)
    stop = free[0, 2].item()
    ended = case.generate(inputs, eos_token_id=[stop])
    first = free[0].tolist().index(stop)
    pad = case.model.generation_config.pad_token_id
    assert ended[0].tolist() == free[0, : first + 1].tolist() + [pad] * (ended.shape[1] - first - 1)


def test_asking_for_no_new_token_is_an_error(loaded):
    case = loaded("nvila_lite_image")
    with pytest.raises(ValueError, match="max_new_tokens"):
        case.generate(case.encode(ONE), max_new_tokens=0)


def test_prefill_computes_logits_of_the_last_position_only(loaded):
    case = loaded("nvila_lite_image")
    positions = []
    hook = case.model.lm_head.register_forward_pre_hook(lambda module, args: positions.append(args[0].shape[1]))
    case.generate(case.encode(TWO))
    hook.remove()
    assert positions == [1] * NEW_TOKENS


class Hangup(Exception):
    pass


class HangUpAfter(BaseStreamer):
    """A listener that goes away in the middle of the answer."""

    def __init__(self, tokens):
        self.left = tokens

    def put(self, value):
        self.left -= 1
        if self.left < 0:
            raise Hangup

    def end(self):
        pass


@pytest.mark.parametrize("checkpoint", CHECKPOINTS[:2])
@pytest.mark.parametrize("tokens", [0, 1, 4])
def test_an_interrupted_answer_changes_no_later_one(loaded, checkpoint, tokens):
    case = loaded(checkpoint)
    inputs = case.encode(ONE)
    expected, text = case.logits(inputs), case.logits(case.encode(TEXT))
    with pytest.raises(Hangup):
        case.generate(inputs, streamer=HangUpAfter(tokens))
    assert_same(case.logits(case.encode(TEXT)), text)
    assert_same(case.logits(inputs), expected)


@pytest.fixture
def context(loaded):
    """`context(length)`: a model whose language model was made for so many tokens."""
    case = loaded("nvila_lite_image")
    config = case.model.config.text_config
    kept = config.max_position_embeddings

    def limit(length):
        config.max_position_embeddings = length
        return case

    yield limit
    config.max_position_embeddings = kept


def test_a_prompt_longer_than_the_context_is_refused_before_any_work(context):
    case = context(4096)
    inputs = case.encode(MIXED)
    longest = inputs["input_ids"].shape[1]
    context(longest)
    assert case.generate(inputs).shape == (3, NEW_TOKENS)
    context(longest - 1)
    case.tiles.clear()
    for given in (inputs, {"inputs_embeds": torch.zeros(1, longest, case.model.config.text_config.hidden_size)}):
        with pytest.raises(ValueError, match=f"has {longest} tokens, more than the {longest - 1} of .* context"):
            case.model.generate(**given, **GREEDY)
    assert case.tiles == []
    assert case.generate(case.encode(TEXT)).shape == (1, NEW_TOKENS)


def test_padding_and_a_scaled_rope_do_not_count_against_the_context(context, monkeypatch):
    case = context(4096)
    inputs = case.encode(ONE)
    expected, length = case.logits(inputs), inputs["input_ids"].shape[1]
    context(length)
    padded = {**inputs} | {name: F.pad(inputs[name], (9, 0)) for name in ("input_ids", "attention_mask")}
    assert_same(case.logits(padded), expected)
    context(length - 1)
    monkeypatch.setitem(case.model.config.text_config.rope_parameters, "rope_type", "linear")
    assert_same(case.logits(inputs), expected)


def test_a_continued_chat_counts_what_the_cache_holds(context):
    case = context(4096)
    first, second = CONTINUATIONS["new text"]
    cache = dynamic_cache(case)
    answer(case, case.encode(first), "It is blue", cache)
    whole = case.encode([*first, said("It is blue"), *second])
    length = whole["input_ids"].shape[1]
    context(length - 1)
    new_turn = {**whole, "input_ids": whole["input_ids"][:, cache.get_seq_length() :]}
    for inputs in (whole, new_turn):
        with pytest.raises(ValueError, match=f"has {length} tokens"):
            case.generate(inputs, past_key_values=cache)


# ---- batches


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize(
    "chats", [MIXED, [TWO, TEXT], [TEXT, TEXT, ONE, ONE]], ids=["mixed", "pictures first", "repeated"]
)
def test_left_padded_rows_equal_single_rows(loaded, checkpoint, chats):
    case = loaded(checkpoint)
    for row, chat in zip(case.logits(case.encode(chats)), chats):
        assert_same(row, case.logits(case.encode(chat))[0])


def test_two_threads_get_the_answers_they_get_alone(loaded):
    case = loaded("nvila_lite_image")
    prompts = [case.encode(ONE), case.encode(TWO)]
    alone, together = [case.logits(inputs) for inputs in prompts], [[], []]

    def work(number):
        together[number] = [case.logits(prompts[number]) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answers, expected in zip(together, alone):
        assert len(answers) == 4
        for each in answers:
            assert_same(each, expected)


# ---- encoding once

ONCE = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "prefill in chunks": {"prefill_chunk_size": 5},
    "static": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("way", ONCE)
def test_every_picture_is_encoded_once_per_call(loaded, checkpoint, way):
    case = loaded(checkpoint)
    inputs = case.encode(MIXED)
    case.tiles.clear()
    case.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    once = sum(case.tiles)
    case.tiles.clear()
    case.generate(inputs, **ONCE[way])
    assert sum(case.tiles) == once > 0


@pytest.mark.parametrize("way", ["prompt lookup", "assistant"])
def test_speculative_decoding_encodes_pictures_once(loaded, way):
    case = loaded("nvila_lite_image")
    inputs = case.encode(TWO)
    case.tiles.clear()
    case.generate(inputs, **SINGLE_ROW_DECODING[way](case))
    assert sum(case.tiles) == len(inputs["pixel_values"])
