"""`python -m vila.quantize MODEL OUT`."""

import argparse
import sys

from ..quantization_vila import HEAD_BITS
from .checkpoint import from_llm_awq, quantize
from .options import BITS, DTYPES, METHODS, Options


def parse(arguments: list[str]) -> argparse.Namespace:
    default = Options()
    parser = argparse.ArgumentParser(prog="python -m vila.quantize", description="int4 weights for a VILA checkpoint")
    parser.add_argument("model", help="folder or Hub id of a converted or original checkpoint")
    parser.add_argument("out", help="new folder; a run that was stopped goes on there")
    parser.add_argument("--method", choices=METHODS, default=default.method, help="default: %(default)s")
    parser.add_argument("--from-llm-awq", metavar="FILE", help="take the int4 layers of a published *-v2.pt file")
    parser.add_argument("--bits", type=int, choices=BITS, default=default.bits, help="3 is for comparisons")
    parser.add_argument("--group-size", type=int, default=default.group_size, help="default: %(default)s")
    parser.add_argument("--head-bits", type=int, choices=HEAD_BITS, default=default.head_bits, help="16: as it is")
    parser.add_argument("--calibration", metavar="DIR|JSONL", help="default: what is drawn, and English prose")
    parser.add_argument("--samples", type=int, default=default.samples, help="conversations; default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=default.max_tokens, help="of each; default: %(default)s")
    parser.add_argument("--media-share", type=float, default=default.media_share, help="of them; default: %(default)s")
    parser.add_argument("--no-duo", dest="duo", action="store_false", help="scales by activations alone")
    parser.add_argument("--no-clip", dest="clips", action="store_false", help="do not search for clipping")
    parser.add_argument("--seed", type=int, default=default.seed, help="of the calibration")
    parser.add_argument("--dtype", choices=DTYPES, default=default.dtype, help="of the rest; default: %(default)s")
    parser.add_argument("--device", help="that searches (default: the CPU)")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    given = vars(parse(arguments))
    model, out, calibration, device, file = (
        given.pop(name) for name in ("model", "out", "calibration", "device", "from_llm_awq")
    )
    try:
        if file is not None:
            path = from_llm_awq(model, file, out, Options(**given))
        else:
            path = quantize(model, out, Options(**given), calibration, device)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"vila.quantize: {error}")
    sys.stdout.write(f"{path}\n")
