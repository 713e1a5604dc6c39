"""Metadata and dependencies of hsa-merge, once. The folder kernels/ installs as hsa.kernels."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent

VERSION = {}
exec((HERE / "hsa" / "_version.py").read_text(encoding="utf-8"), VERSION)

PACKAGES = ["hsa", "hsa.kernels", *(f"hsa.{name}" for name in find_packages(str(HERE / "hsa")))]

setup(
    name="hsa-merge",
    version=VERSION["__version__"],
    description="Merge fine-tunes of speech models exactly, and find the merge that serves your data",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    packages=PACKAGES,
    package_dir={"hsa": "hsa", "hsa.kernels": "kernels"},
    package_data={
        "hsa": ["py.typed"],
        "hsa.views": ["*.html", "*.css", "*.js"],
    },
    install_requires=[
        "torch>=2.11,<3",
        "triton>=3.6,<4; platform_system == 'Linux'",
        "transformers>=5.17,<6",
        "safetensors>=0.8,<1",
        "numpy>=1.26,<3; python_version < '3.13'",
        "numpy>=2.1,<3; python_version >= '3.13'",
        "huggingface_hub>=1.5,<3",
        "typer>=0.20,<1",
        "rich>=13,<16",
        "blake3>=1.0,<2",
        "pyyaml>=6.0.2,<7",
        "threadpoolctl>=3.5,<4",
    ],
    extras_require={
        "mergekit": ["mergekit>=0.1.5,<0.2"],
        "eval": ["jiwer>=4,<5", "soundfile>=0.13,<1", "soxr>=0.5,<2"],
        "search": [
            "optuna>=5,<6",
            "cmaes>=0.11,<1",
            "scipy>=1.11,<2",
            "jiwer>=4,<5",
            "soundfile>=0.13,<1",
            "soxr>=0.5,<2",
        ],
        "ray": ["ray>=2.40,<3"],
        "plot": ["matplotlib>=3.9,<4"],
        "dev": [
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "hypothesis>=6.100,<7",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "soundfile>=0.13,<1",
            "pre-commit>=4,<5",
            "matplotlib>=3.9,<4",
            "jiwer>=4,<5",
            "soxr>=0.5,<2",
            "optuna>=5,<6",
            "cmaes>=0.11,<1",
            "scipy>=1.11,<2",
            "psycopg2-binary>=2.9,<3",
            "pytest-benchmark>=5,<6",
            "playwright>=1.49,<2",
            "mpmath>=1.3,<2",
            "mkdocs>=1.6,<2",
            "mkdocs-material>=9.6,<10",
            "mkdocstrings>=0.30,<2",
            "mkdocstrings-python>=1.16,<3",
        ],
        "fuzz": [
            "atheris>=3,<4; python_version >= '3.11' and platform_system == 'Linux' and platform_machine == 'x86_64'"
        ],
        "deploy": ["ctranslate2>=4.8,<5", "faster-whisper>=1.2,<2"],
        "integrations": [
            "peft>=0.17,<1",
        ],
    },
    entry_points={"console_scripts": ["hsa = hsa.__main__:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
