"""Everything about fastkd that only a GPU can tell, measured in ten minutes.

    python -m bench.device --out results                          on a GPU
    python -m bench.device --out results --bundle bundle.tar      with a real teacher and real text
    python -m bench.device --out results --parts environment,smoke,full_step --minutes 2.5
    python -m bench.device --out rehearsal --device cpu           the same code in tiny sizes, without a GPU

Each part runs in a process of its own and is cut off at its limit. ``OUT/README.md`` sets what was measured beside what
is claimed; ``OUT/<part>.jsonl``, ``.md``, ``.png`` and ``.log`` are a part's rows, table, picture and output, and
``OUT.tar.gz`` is all of it. OUT is new, or the folder of an earlier run, in which the parts that run are replaced. Without
a bundle teachers are random, with a tokenizer trained on the spot, and text is generated: times are the same, losses mean
nothing.

Exit codes: 0 all parts ran, 2 bad input (one line, nothing written), 4 a part failed, was cut off or was interrupted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from bench.device.suite import Suite


def main(argv: list[str] | None = None) -> int:
    """Run the suite that the options describe; its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.device", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    at_hand = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--bundle", type=Path, metavar="FILE", help="an archive of bench.bundle")
    parser.add_argument("--minutes", type=float, default=10.0, help="that all of it takes at most (default 10)")
    parser.add_argument("--parts", metavar="NAMES", help="comma-separated; default: all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=at_hand, help="cpu: a rehearsal in tiny sizes")
    options = parser.parse_args(argv)
    parts = None if options.parts is None else [name.strip() for name in options.parts.split(",") if name.strip()]
    try:
        if options.device == "cuda" and at_hand != "cuda":
            raise ValueError("--device cuda: PyTorch finds no GPU; rehearse with --device cpu")
        run = Suite(options.out, options.device, options.minutes, parts, options.bundle).start()
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        return run.run()
    except OSError as error:
        print(f"error: results cannot be written any more: {error}", file=sys.stderr)
        return 4


if __name__ == "__main__":
    sys.exit(main())
