"""Serves a VILA checkpoint to OpenAI clients with the stock server of transformers: `vila-serve`.

- `transformers serve` does the work. It looks classes up by name in `transformers`, where these ones are put.
- The model that was named is loaded through this package (an original is converted on first use), and no other one.
- Requests come from strangers: media go through the `"server"` policy, options through a list; refused is a 400.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging
from transformers.utils.import_utils import is_serve_available

from .commands_vila import INTERRUPTED, USER_ERRORS, one_line
from .families_vila import FAMILIES
from .loading_vila import Checkpoint
from .media_policy_vila import MediaPolicy

logger = logging.get_logger(__name__)

# what is served; the others take sound, load other models or unload this one
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health", "/load_model")
# what a request may set in `chat_template_kwargs`: how its media are shown, nothing of the policy or of the template
MEDIA_OPTIONS = ("num_frames", "fps", "video_max_tiles", "min_tiles", "max_tiles", "tile_multiple_images")
# and in `generation_config`, which `transformers chat` sends: nothing that multiplies the work
SAMPLING_OPTIONS = (
    "bos_token_id",
    "do_sample",
    "eos_token_id",
    "max_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "pad_token_id",
    "repetition_penalty",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "transformers_version",
    "typical_p",
)
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens")
NUMBER = (int, float)
TYPES: dict[str, Any] = {
    "frequency_penalty": NUMBER,
    "logit_bias": Mapping,
    "seed": int,
    "stop": (str, list),
    "temperature": NUMBER,
    "top_p": NUMBER,
}
# a message's parts, and where each holds what it brings: directly, or as the URL of an object
PARTS = {"text": "text", "image_url": "image_url", "video_url": "video_url"}
# and those of the responses endpoint
INPUT_PARTS = {"input_text": "text", "output_text": "text", "input_image": "image_url", "video_url": "video_url"}


def register_with_transformers() -> None:
    """Puts the classes where the server looks for an architecture, and names them as taking pictures and videos.

    Not in the list of any-to-any models: of those the server also wants a video's sound.
    """
    package = sys.modules["transformers"]  # the module object is replaced while transformers is imported
    for model_type, family in FAMILIES.items():
        if family.model_class.can_generate():
            setattr(package, family.model_class.__name__, family.model_class)
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type] = family.model_class.__name__


def model_manager_of(checkpoint: Checkpoint, policy: MediaPolicy) -> type:
    """The server's model manager, for one checkpoint whose processor keeps to the policy."""
    from transformers.cli.serving.model_manager import ModelManager

    class OneCheckpoint(ModelManager):
        def _load_processor(self, name: str, gguf_file: str | None = None) -> Any:
            self.check_name(name)
            processor = checkpoint.load_processor()
            processor.media_policy = policy
            return processor

        def _load_model(self, name: str, *args: Any, **kwargs: Any) -> Any:
            self.check_name(name)
            # the stock way, with its options, from the folder that loads
            model = super()._load_model(f"{checkpoint.folder}@main", *args, **kwargs).eval()
            model.generate = saying_no_in_one_line(model.generate)
            return model

        def check_name(self, name: str) -> None:
            if name != self.process_model_name(str(self.force_model)):
                raise ValueError("this server has one model: see /v1/models")

        def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
            return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "vila"}]

    return OneCheckpoint


def build_served_app(build: Callable[..., Any], policy: MediaPolicy, context: int, *handlers: Any, **more: Any) -> Any:
    """The stock app, with what strangers may send checked first, and the checkpoint's own choice of video frames.

    Args:
        build: transformers' `build_server`; `handlers` and `more` are its arguments.
        context: tokens of the language model's context, the most that a request may ask for.
    """
    from fastapi import Request
    from fastapi.responses import JSONResponse
    from starlette.middleware.body_limit import RequestBodyLimitMiddleware

    for handler in (*handlers[1:], *more.values()):
        if hasattr(handler, "chat_template_kwargs"):
            handler.chat_template_kwargs = {"num_frames": None, **handler.chat_template_kwargs}
            handler._validate_request = checked(handler._validate_request, context)
            handler._build_generation_config = sampling(handler._build_generation_config)
    app = build(*handlers, **more)
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", None) in PATHS]

    @app.exception_handler(ValueError)
    async def refuse(_request: Request, error: ValueError) -> JSONResponse:
        """A request that cannot be answered, in OpenAI's form; clients do not try it again, as they would a 500."""
        message = one_line(error)
        logger.warning(f"Refused a request: {message}")
        return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=400)

    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=2 * policy.max_bytes)
    return app


def saying_no_in_one_line(generate: Callable[..., Any]) -> Callable[..., Any]:
    """`generate()` whose refusals may stand in a line of a stream, into which the server writes them as they are."""

    @functools.wraps(generate)
    def generate_or_refuse(*args: Any, **kwargs: Any) -> Any:
        try:
            return generate(*args, **kwargs)
        except ValueError as error:
            message = one_line(error)
            raise ValueError(message.replace("\\", "/").replace('"', "'")) from error

    return generate_or_refuse


def checked(validate: Callable[[dict], Any], context: int) -> Callable[[dict], Any]:
    """The server's own check of a request's body, and ours behind it."""

    def validate_request(body: dict) -> Any:
        validated = validate(body)
        check_request(body, context)
        return validated

    return validate_request


def sampling(build: Callable[..., Any]) -> Callable[..., Any]:
    """The server's own options of `generate()`, which sample where a request asks for a temperature above 0."""

    def build_generation_config(body: dict, *args: Any, **kwargs: Any) -> Any:
        config = build(body, *args, **kwargs)
        config.do_sample = bool(body["temperature"]) if body.get("temperature") is not None else config.do_sample
        return config

    return build_generation_config


def check_request(body: dict[str, Any], context: int) -> None:
    """Refuses what the server would stumble over, ignore or be overworked by.

    Raises:
        ValueError: in fixed words that name the field.
    """
    if "prompt" not in body and not isinstance(body.get("input"), str):
        name, parts = ("input", INPUT_PARTS) if "input" in body else ("messages", PARTS)
        check_messages(body.get(name), name, parts)
    check_names(body.get("chat_template_kwargs") or {}, MEDIA_OPTIONS, "chat_template_kwargs")
    for name, kind in TYPES.items():
        if body.get(name) is not None and not isinstance(body[name], kind):
            raise ValueError(f"{name} has the wrong type")
    text = body.get("generation_config") or "{}"
    generation = json.loads(text) if isinstance(text, str) else text
    check_names(generation, SAMPLING_OPTIONS, "generation_config")
    for name, value in {**generation, **body}.items():
        if name in LENGTHS and value is not None and not (type(value) is int and 1 <= value <= context):
            raise ValueError(f"{name} must be a whole number from 1 to {context}, the model's context")


def check_names(options: Any, known: tuple[str, ...], field: str) -> None:
    if not isinstance(options, Mapping) or not set(known).issuperset(options):
        raise ValueError(f"{field} must hold nothing but {', '.join(known)}")


def check_messages(messages: Any, name: str, parts: dict[str, str]) -> None:
    """See `check_request`: messages in OpenAI's form, with `video_url` beside the pictures."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name} must be a list of messages")
    for index, message in enumerate(messages):
        where = f"{name}[{index}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where} must be an object with a role")
        content = message.get("content")
        if content is not None and not isinstance(content, (str, list)):
            raise ValueError(f"{where}: content must be a text or a list of parts")
        for number, part in enumerate(content if isinstance(content, list) else []):
            check_part(part, f"{where}.content[{number}]", parts)


def check_part(part: Any, where: str, parts: dict[str, str]) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str) or kind not in parts:
        raise ValueError(f"{where} must have the type {', '.join(parts)}")
    name = parts[kind]
    value = part.get(name)
    # the server reads a picture's URL in both forms, a video's in an object alone
    if name != "text" and (isinstance(value, Mapping) or name == "video_url"):
        name, value = f"{name}.url", value.get("url") if isinstance(value, Mapping) else None
    if not isinstance(value, str):
        raise ValueError(f"{where} must hold a text as {name}")


def serve(model: str, options: list[str], policy: MediaPolicy) -> None:
    """Runs the server until it is interrupted.

    Args:
        model: folder or Hub id, see `Checkpoint`.
        options: of `transformers serve`.

    Raises:
        OSError, ValueError: in words for the user, before anything is served.
    """
    from transformers.cli.serving import model_manager, server
    from transformers.cli.transformers import app

    checkpoint = Checkpoint(model)
    if "@" in f"{model}{checkpoint.folder}":
        raise ValueError(f"{checkpoint.folder}: transformers serve takes what stands behind an @ for a revision")
    config = checkpoint.family.config_class.from_pretrained(checkpoint.folder)
    build, context = server.build_server, config.text_config.max_position_embeddings

    def build_server(*handlers: Any, **more: Any) -> Any:
        return build_served_app(build, policy, context, *handlers, **more)

    register_with_transformers()
    # the command looks both up when it runs
    vars(model_manager)["ModelManager"] = model_manager_of(checkpoint, policy)
    vars(server)["build_server"] = build_server
    app(["serve", model, *options], prog_name="transformers")


def policy_change(text: str) -> MediaPolicy:
    """An argparse type: the `"server"` policy with the changes of a JSON object."""
    try:
        change = json.loads(text)
        if not isinstance(change, dict):
            raise ValueError("it must be a JSON object of the fields to change")
        return MediaPolicy.server().changed(change)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and those of the stock server."""
    parser = argparse.ArgumentParser(
        prog="vila-serve",
        usage="%(prog)s MODEL [--media-policy JSON] [options of transformers serve]",
        description=__doc__.split("\n")[0],
        epilog="All other options, --host, --port and --device among them, are told of by: transformers serve --help",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="converted or original folder or Hub id; its name for clients")
    parser.add_argument(
        "--media-policy",
        metavar="JSON",
        type=policy_change,
        default=MediaPolicy.server(),
        help="what of the server policy to change: '{\"urls\": true}' also fetches from public addresses "
        "(default: pictures and videos come as data URIs)",
    )
    if arguments and arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"):
        parser.error("MODEL stands first")
    return parser.parse_known_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    own, options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    if not is_serve_available():
        sys.exit("vila-serve: the server's packages are missing: pip install 'vila-hf[serve]'")
    try:
        serve(own.model, options, own.media_policy)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except USER_ERRORS as error:
        sys.exit(f"vila-serve: {one_line(error)}")


if __name__ == "__main__":
    main()
