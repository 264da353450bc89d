"""How the package's commands end when something goes wrong: which errors are told in one line, and exit codes."""

import torch
from safetensors import SafetensorError

USER_ERRORS = (OSError, ValueError, SafetensorError, torch.OutOfMemoryError)
INTERRUPTED, PIPE_CLOSED = 130, 141  # as shells count: 128 and the signal's number


def one_line(error: object) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split())
