import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dmpo_jax import lora

RANK = 2


class Inner(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Dense(6, use_bias=False, name="attn1.to_q")(x)
    return nn.Dense(4, name="to_out.0")(x)


class Model(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = Inner(name="blocks.0")(x)
    return nn.Conv(3, (3, 3), name="conv_out")(x[None, None])[0, 0]


@pytest.fixture
def model():
  x = np.random.default_rng(0).standard_normal((7, 5), np.float32)
  params = Model().init(jax.random.key(0), x)["params"]
  return jax.tree.map(np.asarray, params), jnp.asarray(x)


def random_delta(params, targets=("to_q", "to_out.0")):
  delta = lora.init_delta(params, rank=RANK, targets=targets, seed=0)
  generator = np.random.default_rng(1)
  for pair in delta.values():
    pair["up"] = generator.standard_normal(pair["up"].shape, np.float32)
  return delta


def apply(params, x):
  inner, context = lora.split_adapted(params)
  with context:
    return Model().apply({"params": inner}, x)


def test_a_new_delta_changes_not_a_bit(model):
  params, x = model
  delta = lora.init_delta(params, rank=RANK, targets=["to_q"], seed=0)
  assert list(delta) == ["blocks.0.attn1.to_q"]
  assert delta["blocks.0.attn1.to_q"]["down"].std() > 0
  adapted = lora.Adapted(params, lora.Adapter(delta, 4.0))
  np.testing.assert_array_equal(apply(adapted, x), apply(params, x))


def test_adapted_equals_the_formula_and_merged(model):
  params, x = model
  delta = random_delta(params)
  adapted = apply(lora.Adapted(params, lora.Adapter(delta, 0.5)), x)
  merged = lora.merge(params, lora.Adapter(delta, 0.5))
  np.testing.assert_allclose(adapted, apply(merged, x), rtol=1e-5, atol=1e-5)
  pair = delta["blocks.0.attn1.to_q"]
  kernel = params["blocks.0"]["attn1.to_q"]["kernel"].astype(np.float64)
  expected = kernel + 0.5 * pair["down"].astype(np.float64) @ pair["up"].astype(np.float64)
  # 1e-7: float32 rounding of terms near 1, which may cancel.
  got = merged["blocks.0"]["attn1.to_q"]["kernel"]
  np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)
  assert merged["conv_out"]["kernel"] is params["conv_out"]["kernel"]
  assert np.abs(adapted - apply(params, x)).max() > 0.1


def test_seed_and_name_decide_the_values(model):
  params, _ = model
  both, one = random_delta(params), random_delta(params, ["to_q"])
  name = "blocks.0.attn1.to_q"
  np.testing.assert_array_equal(both[name]["down"], one[name]["down"])
  other = lora.init_delta(params, rank=RANK, targets=["to_q"], seed=1)
  assert np.any(other[name]["down"] != one[name]["down"])


def test_gradient_reaches_the_delta_alone_through_the_zero(model):
  """At B = 0 the gradient of A is 0 and that of B is not (Hu et al., section 4.1)."""
  params, x = model
  delta = lora.init_delta(params, rank=RANK, targets=["to_q"], seed=0)

  def loss(delta):
    return jnp.square(apply(lora.Adapted(params, lora.Adapter(delta, 1.0)), x)).sum()

  grads = jax.grad(loss)(delta)["blocks.0.attn1.to_q"]
  assert not np.any(grads["down"]) and np.any(grads["up"])


def test_convolutions_are_merged(model):
  params, _ = model
  generator = np.random.default_rng(2)
  pair = {
    "down": generator.standard_normal((3, 3, 4, RANK), np.float32),
    "up": generator.standard_normal((1, 1, RANK, 3), np.float32),
  }
  merged = lora.merge(params, lora.Adapter({"conv_out": pair}, 1.0))["conv_out"]["kernel"]
  x = jnp.asarray(generator.standard_normal((1, 5, 5, 4), np.float32))

  def convolve(x, kernel):
    return jax.lax.conv_general_dilated(
      x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  apart = convolve(x, params["conv_out"]["kernel"])
  apart += convolve(convolve(x, pair["down"]), pair["up"])
  np.testing.assert_allclose(convolve(x, merged), apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"targets": ["to_x"]}, "lora.targets: no module ends in 'to_x'"),
    ({"targets": ["conv_out"]}, "fits conv_out, a convolution; expected Dense layers"),
    ({"rank": 0}, "lora.rank: expected at least 1, got 0"),
    ({"rank": 6}, "lora.rank: 6 is more than blocks.0.attn1.to_q has, 5 x 6"),
  ],
)
def test_bad_settings(model, settings, message):
  with pytest.raises(ValueError, match=message):
    lora.init_delta(model[0], **({"rank": RANK, "targets": ["to_q"], "seed": 0} | settings))


def test_a_delta_of_another_model_is_refused(model):
  params, _ = model
  delta = random_delta(params)
  with pytest.raises(ValueError, match="1 module.* not in the model, first 'mid.to_q'"):
    lora.merge(params, lora.Adapter({"mid.to_q": delta["blocks.0.attn1.to_q"]}, 1.0))
  with pytest.raises(ValueError, match=r"'conv_out' has a delta of shape \[5, 6\]; expected"):
    lora.merge(params, lora.Adapter({"conv_out": delta["blocks.0.attn1.to_q"]}, 1.0))
