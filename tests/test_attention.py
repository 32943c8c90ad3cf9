"""Attention by blocks against float64 NumPy and against the plain form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax import sharding
from dmpo_jax.models import attention

LONG = attention.MANY_TOKENS


def draw(queries, keys, heads=2, width=8, batch=2, dtype=np.float32):
  generator = np.random.default_rng(0)
  shapes = [(batch, tokens, heads * width) for tokens in (queries, keys, keys)]
  return [jnp.asarray(generator.standard_normal(shape), dtype) for shape in shapes]


def oracle(query, key, value, heads):
  """softmax(q k^T / sqrt(d)) v, head by head, float64."""
  out = []
  for q, k, v in zip(*(np.asarray(each, np.float64) for each in (query, key, value)), strict=True):
    parts = []
    for head in range(heads):
      width = q.shape[-1] // heads
      part = slice(head * width, (head + 1) * width)
      scores = q[:, part] @ k[:, part].T / np.sqrt(width)
      weights = np.exp(scores - scores.max(axis=1, keepdims=True))
      parts.append(weights / weights.sum(axis=1, keepdims=True) @ v[:, part])
    out.append(np.concatenate(parts, axis=1))
  return np.stack(out)


def temporaries(kernel, inputs):
  """Bytes that the compiled gradient holds besides its inputs and outputs."""

  def loss(inputs):
    return jnp.square(attention.attention(*inputs, 2, kernel=kernel)).sum()

  compiled = jax.jit(jax.grad(loss)).lower(inputs).compile()
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("kernel", ["cpu", "gpu"])
@pytest.mark.parametrize("queries, keys", [(LONG, LONG), (LONG + 9, LONG + 3), (9, 77), (LONG, 77)])
def test_equals_float64_numpy(kernel, queries, keys):
  inputs = draw(queries, keys)
  got = jax.jit(functools.partial(attention.attention, heads=2, kernel=kernel))(*inputs)
  # Float32 sums of at most a thousand weights that add up to one.
  np.testing.assert_allclose(got, oracle(*inputs, 2), atol=3e-6)


@pytest.mark.parametrize("kernel", ["cpu", "gpu"])
def test_large_scores_do_not_overflow(kernel):
  query, key, value = draw(LONG, LONG)
  got = attention.attention(100 * query, key, value, 2, kernel=kernel)
  np.testing.assert_allclose(got, oracle(100 * query, key, value, 2), atol=1e-3)  # scores near 1e3


@pytest.mark.parametrize("kernel", ["cpu", "gpu"])
def test_gradient_equals_that_of_the_plain_form(kernel, monkeypatch):
  inputs = draw(LONG + 5, LONG)

  def loss(inputs):
    return jnp.square(attention.attention(*inputs, 2, kernel=kernel)).sum()

  got = jax.jit(jax.grad(loss))(inputs)
  monkeypatch.setattr(attention, "MANY_TOKENS", 10**9)
  expected = jax.jit(jax.grad(lambda inputs: loss(inputs)))(inputs)
  for one, other in zip(got, expected, strict=True):
    scale = float(jnp.abs(other).max())
    np.testing.assert_allclose(one / scale, other / scale, atol=3e-6)


@pytest.mark.parametrize("kernel, scores", [("cpu", 1), ("gpu", 4)])
def test_scores_of_all_tokens_are_never_held(kernel, scores):
  """Twice the tokens, twice the memory; all scores would be four times as many."""
  sizes = [temporaries(kernel, draw(tokens, tokens)) for tokens in (2 * LONG, 4 * LONG)]
  assert sizes[1] < 2.6 * sizes[0]
  # One block of scores is 256 queries by all keys, for `scores` (batch x heads) at once; the
  # backward pass holds a few such blocks.
  block = 4 * attention.QUERIES * 4 * LONG
  assert sizes[1] < 8 * block * scores


def test_bfloat16_accumulates_in_float32():
  inputs = draw(LONG, LONG, dtype=jnp.bfloat16)
  for kernel in ("cpu", "gpu"):
    got = attention.attention(*inputs, 2, kernel=kernel)
    assert got.dtype == jnp.bfloat16
    # One rounding of weights and one of the result, 2^-9 each of values below one.
    np.testing.assert_allclose(np.float32(got), oracle(*inputs, 2), atol=6e-3)


def test_the_batch_stays_on_its_devices():
  mesh = sharding.make_mesh()
  inputs = draw(LONG, LONG, batch=8)
  place = sharding.batch_sharding(mesh)
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in inputs]

  def loss(*inputs):
    return jnp.square(attention.attention(*inputs, 2)).sum()

  text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile().as_text()
  assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))


def test_the_tpu_kernel_equals_float64_numpy():
  """Interpreted on CPU: the arithmetic of the kernel, not its speed."""
  from jax.experimental.pallas import tpu as pallas_tpu

  inputs = draw(LONG, LONG, batch=1)
  with pallas_tpu.force_tpu_interpret_mode():
    got = attention.attention(*inputs, 2, kernel="tpu")
  np.testing.assert_allclose(got, oracle(*inputs, 2), atol=3e-6)


def test_masked_and_short_attention_is_plain_on_every_device():
  inputs = draw(9, 9)
  mask = np.tril(np.ones((9, 9), bool))
  plain = [attention.attention(*inputs, 2, mask, kernel=kernel) for kernel in attention.KERNELS]
  np.testing.assert_array_equal(plain[0], plain[1])
  np.testing.assert_array_equal(plain[0], plain[2])
  np.testing.assert_allclose(plain[0][:, 0], inputs[2][:, 0], rtol=1e-6)  # sees itself alone
