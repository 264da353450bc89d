"""Makes a finished run a checkpoint: `python examples/nano_u/publish_u.py nano-u-run/final scores.json`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nano"))

from evaluate_u import DEFAULT_MODEL, table_of
from publish import main

CARD = Path(__file__).with_name("model_card.md")

if __name__ == "__main__":
    main(sys.argv[1:], DEFAULT_MODEL, CARD, table_of)
