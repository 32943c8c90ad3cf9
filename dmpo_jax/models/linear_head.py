"""The head of the LAION aesthetic predictor and of ImageReward: dense layers with nothing between.

Source: github.com/christophschuhmann/improved-aesthetic-predictor, simple_inference.py, class MLP;
github.com/THUDM/ImageReward, ImageReward/ImageReward.py has the same. Their activations are
commented out and dropout does nothing when scoring, so the whole is one affine map.
"""

from flax import linen as nn
from jaxtyping import Array, Float

WIDTHS = (1024, 128, 64, 16, 1)
# Places of the dense layers in PyTorch's Sequential, between which dropouts stand.
PLACES = (0, 2, 4, 6, 7)


class LinearHead(nn.Module):
  """An embedding -> one number; tensor names are `layers.0.weight` to `layers.7.bias`."""

  @nn.compact
  def __call__(self, x: Float[Array, "B D"]) -> Float[Array, " B"]:
    for place, width in zip(PLACES, WIDTHS, strict=True):
      x = nn.Dense(width, name=f"layers.{place}")(x)
    return x[:, 0]
