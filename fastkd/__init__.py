"""fastkd: the best small encoder a fixed compute budget can buy, pretrained from scratch or distilled."""

__version__ = "0.1.0"
