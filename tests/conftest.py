"""Guards for every test: 8 CPU devices, no silent broadcasting, no key used twice, no network."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest
import torch

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
torch.set_num_threads(1)  # two threads beside a busy core are many times slower


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
  """Programs compiled once serve all tests, and the processes that tests start."""
  folder = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("xla")))
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
