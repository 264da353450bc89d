"""Entry of Inference Endpoints: a chat in, its answer out, by transformers' pipeline and with limits on."""

from typing import Any

import torch
from transformers import AutoProcessor, pipeline

# what a request may change, and between which values
PARAMETERS: dict[str, tuple[Any, float, float]] = {
    "max_new_tokens": (int, 1, 2048),
    "temperature": (float, 0.01, 10.0),
    "top_p": (float, 0.01, 1.0),
    "top_k": (int, 1, 1000),
    "repetition_penalty": (float, 0.1, 10.0),
    "num_beams": (int, 1, 8),
    "do_sample": (bool, 0, 1),
}
DEFAULT_MAX_NEW_TOKENS = 512


class EndpointHandler:
    """
    Args:
        path: the repository's folder.

    Pictures and videos come as base64 or data URIs: the endpoint reads no paths and fetches no URLs, and every limit
    of the media policy `"server"` holds.
    """

    def __init__(self, path: str = ""):
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=True, media_policy="server")
        self.pipeline: Any = pipeline(
            "image-text-to-text",
            model=path,
            processor=processor,
            trust_remote_code=True,
            dtype="auto",
            device=0 if torch.cuda.is_available() else -1,
        )

    def __call__(self, data: dict[str, Any]) -> list[dict[str, str]]:
        """
        Args:
            data: `inputs`, a text or the messages of a chat, and `parameters`, see `PARAMETERS`. `messages` may stand
                for `inputs`.

        Returns:
            `[{"generated_text": answer}]`

        Raises:
            ValueError: naming what is wrong with the request; the next request is served all the same.
        """
        if not isinstance(data, dict):
            raise ValueError("a request is an object with inputs and parameters")
        chat = as_chat(data.get("inputs", data.get("messages")))
        options = as_options(data.get("parameters"))
        (answer,) = self.pipeline(text=chat, return_full_text=False, generate_kwargs=options)
        return [{"generated_text": answer["generated_text"]}]


def as_chat(inputs: Any) -> list[dict[str, Any]]:
    """A text or the messages of one chat -> the messages.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(inputs, str) and inputs:
        return [{"role": "user", "content": [{"type": "text", "text": inputs}]}]
    if not isinstance(inputs, list) or not inputs or not all(isinstance(message, dict) for message in inputs):
        raise ValueError("inputs must be a text or a list of messages with role and content")
    for number, message in enumerate(inputs):
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), (str, list)):
            raise ValueError(f"message {number} of inputs needs a role, and a content that is a text or a list")
    return inputs


def as_options(parameters: Any) -> dict[str, Any]:
    """The request's parameters, checked.

    Raises:
        ValueError: naming the parameter that is of the wrong type or out of range, or those known.
    """
    if not isinstance(parameters, (dict, type(None))):
        raise ValueError("parameters must be an object")
    options: dict[str, Any] = {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS}
    for name, value in (parameters or {}).items():
        if name not in PARAMETERS:
            raise ValueError(f"an unknown parameter is given; known are {', '.join(PARAMETERS)}")
        kind, least, most = PARAMETERS[name]
        number = float(value) if kind is float and type(value) is int else value
        if type(number) is not kind or not least <= number <= most:
            raise ValueError(f"{name} must be of the type {kind.__name__}, from {least} to {most}")
        options[name] = number
    if {"temperature", "top_p", "top_k"} & options.keys():
        options.setdefault("do_sample", True)
    return options
