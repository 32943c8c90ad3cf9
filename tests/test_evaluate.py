"""evaluate.py: what is sampled is the model's, however its parameters came."""

import numpy as np
import pytest
import tiny

from dmpo_jax import base as base_lib
from dmpo_jax import evaluate

PROMPTS = ("love", "a sad cat")


@pytest.mark.slow
def test_a_base_that_is_read_later_draws_the_same(tiny_base):
  """As `dmpo evaluate` opens it, against one that is read at once."""

  def draw(lazy):
    base = base_lib.load_base(str(tiny_base), lazy=lazy)
    return evaluate.sample_prompts(
      evaluate.make_sampler(base, tiny.sampling(steps=2)),
      base,
      base.params["unet"],
      PROMPTS,
      1,
      seed=0,
      title="sampling",
    )

  np.testing.assert_array_equal(draw(lazy=True), draw(lazy=False))
