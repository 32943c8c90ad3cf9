"""Guards for every test: 8 CPU devices, no silent broadcasting, no key used twice, no network."""

import atexit
import os
import pathlib
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
# Programs compiled once serve all tests, the workers of the suite and the processes tests start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="dmpo-jax-xla-")
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax
import pytest
import tiny
import torch

from dmpo_jax import base as base_lib
from dmpo_jax import stages

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
torch.set_num_threads(1)  # two threads beside a busy core are many times slower


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> pathlib.Path:
  """Folder of a complete base with random weights."""
  return tiny.make_base(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_data(tiny_base, tmp_path_factory) -> pathlib.Path:
  """What `dmpo prepare` makes of emoji_choice/top160 with the tiny base."""
  folder = tmp_path_factory.mktemp("data")
  config = tiny.config(tiny_base)
  stages.prepare(config, base_lib.load_base(config.base), folder)
  return folder
