"""Makes int4 checkpoints of VILA models: `python -m vila.quantize MODEL OUT`."""

from .checkpoint import from_llm_awq, quantize
from .options import Options

__all__ = ["Options", "from_llm_awq", "quantize"]
