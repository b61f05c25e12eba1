"""fastkd: the best small encoder a fixed compute budget can buy, pretrained from scratch or distilled."""

import sys

__version__ = "0.1.0"

if sys.version_info < (3, 11):  # noqa: UP036  # before anything that an older Python could not read
    raise SystemExit("error: fastkd needs Python 3.11 or newer, this is " + sys.version.split()[0])
