"""Makes int4 checkpoints of VILA models: `python -m vila.quantize MODEL OUT`."""

from .checkpoint import quantize
from .options import Options

__all__ = ["Options", "quantize"]
