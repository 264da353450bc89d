"""Answers that are JSON: a logits processor for `generate()`, for any JSON or for a schema.

    generate(**inputs, logits_processor=json_processors(model, processor, schema))

- The grammars are llguidance's (extra `json`): it has no requirements of its own, where xgrammar brings Triton even to
  a machine without a GPU, and its states can be copied, which beams and speculative decoding need.
- The state of a row follows from what the row has written, so rows may end, swap and fork as `generate()` likes, and
  one processor serves any number of calls one after the other.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

ANY_JSON = {"type": ["object", "array"]}
# the model chooses between one line and any indentation, but cannot go on with blanks for ever
WHITESPACE = r"(\n[ \t]{0,40}| ?)"


def json_processors(model: Any, processor: Any, schema: Any = None) -> LogitsProcessorList:
    """What makes `generate(logits_processor=...)` write JSON and then stop.

    Args:
        model: the model that generates; its generation config names the stop tokens.
        processor: its processor or tokenizer.
        schema: see `JsonLogitsProcessor`.

    Raises:
        ValueError: if llguidance is missing, or the schema is none or has parts that cannot be enforced.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    stop = model.generation_config.eos_token_id
    stop_ids = [tokenizer.eos_token_id] if stop is None else [stop] if isinstance(stop, int) else list(stop)
    return LogitsProcessorList([JsonLogitsProcessor(tokenizer, stop_ids, schema)])


class JsonLogitsProcessor(LogitsProcessor):
    """Sets the logits of every token to -inf that would break the JSON, or end it before it is complete.

    Args:
        tokenizer: a fast tokenizer.
        stop_ids: tokens that end an answer; allowed once the JSON is complete, and then nothing else is.
        schema: a JSON schema as a dictionary or a pydantic class; None for any object or array.

    A call with the ids of the one before and one token more continues it; any other prompt starts anew. Logits beyond
    the tokenizer's vocabulary, the padding of some checkpoints, are -inf; a table that is shorter is no obstacle.

    Raises:
        ValueError: as `json_processors`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], schema: Any = None):
        grammar = json_grammar(schema)
        from llguidance import LLMatcher
        from llguidance.hf import from_tokenizer

        self.stop_ids = list(stop_ids)
        self.start = LLMatcher(from_tokenizer(tokenizer, eos_token=self.stop_ids), grammar, log_level=0)  # type: ignore[arg-type]
        self.prompt: torch.Tensor | None = None
        self.longest = 0
        self.states: dict[tuple[int, ...], Any] = {}

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`(rows, sequence)` ids and `(rows, vocabulary)` logits -> logits."""
        if self._is_new(input_ids):
            self.prompt, self.longest, self.states = input_ids.clone(), 0, {(): self.start}
        self.longest = max(self.longest, input_ids.shape[1])
        written = [tuple(row) for row in input_ids[:, self.prompt.shape[1] :].tolist()]  # type: ignore[union-attr]
        # what other rows and earlier steps left is not needed again, or is found by reading the row once more
        self.states = {ids: self._state(ids) for ids in dict.fromkeys(written)}
        allowed = torch.stack([self._allowed(self.states[ids], scores.shape[1]) for ids in written])
        return scores.masked_fill(~allowed.to(scores.device), float("-inf"))  # type: ignore[return-value]

    def _is_new(self, input_ids: torch.Tensor) -> bool:
        """Whether these ids do not continue the answers of the calls before."""
        if self.prompt is None or len(input_ids) != len(self.prompt):
            return True
        begin = self.prompt.shape[1]
        # speculative decoding goes back and forth, but never further ahead than one token
        is_next = begin < input_ids.shape[1] <= self.longest + 1
        return not (is_next and torch.equal(input_ids[:, :begin], self.prompt))

    def _state(self, ids: tuple[int, ...]) -> Any:
        """The state after `ids`; None if they are no JSON, as happens to beams that nothing better was left for.

        Raises:
            ValueError: if the schema is too complex for the text that is written.
        """
        if ids in self.states:
            return self.states[ids]
        state, rest = self.states.get(ids[:-1], self.start), ids[-1:]
        if state is self.start:
            rest = ids
        if state is None:
            return None
        state = state.deep_copy()
        for token in rest:
            if state.is_stopped():
                break  # what follows is padding
            if state.validate_tokens([token]) == 0:
                return None
            if not state.consume_token(token):
                raise ValueError(f"the JSON schema cannot be followed: {state.get_error()}")
        return state

    def _allowed(self, state: Any, vocabulary: int) -> torch.Tensor:
        """`(vocabulary,)` mask of the tokens that may come next."""
        allowed = np.zeros(vocabulary, dtype=bool)
        if state is None or state.is_stopped():
            allowed[[token for token in self.stop_ids if token < vocabulary]] = True
        else:
            bits = np.unpackbits(np.frombuffer(state.compute_bitmask(), np.uint8), bitorder="little")[:vocabulary]
            allowed[: len(bits)] = bits
        return torch.from_numpy(allowed)


def json_grammar(schema: Any = None) -> str:
    """llguidance's grammar of a schema; any object or array if that is None.

    Raises:
        ValueError: as `json_processors`.
    """
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise ValueError("JSON output needs llguidance: pip install 'vila-hf[json]'") from error
    if schema is None:
        schema = ANY_JSON
    if isinstance(schema, type) and hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    if not isinstance(schema, dict):
        raise ValueError(f"a JSON schema must be a dictionary or a pydantic class, got {type(schema).__name__}")
    try:
        text = json.dumps(schema)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the JSON schema is no JSON: {error}") from error
    grammar = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": WHITESPACE})
    if problem := LLMatcher.validate_grammar(grammar):
        raise ValueError(f"the JSON schema cannot be followed: {problem}")
    return grammar


__all__ = ["JsonLogitsProcessor", "json_grammar", "json_processors"]
