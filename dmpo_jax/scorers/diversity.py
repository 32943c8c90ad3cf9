"""How different images of one prompt are, from their embeddings; nothing here is learnt.

float64 NumPy. Embeddings are any vectors in which nearness means likeness: see `embed`.
"""

import numpy as np
from jaxtyping import Float


def vendi_score(embeddings: Float[np.ndarray, "n d"]) -> float:
  """The effective number of different images: exp of the entropy of the eigenvalues of K / n.

  K_ij is the cosine of embeddings i and j (Friedman and Dieng, arXiv 2210.02410, definition 3.1).

  Returns:
    1 for n images that are the same, up to n where no two have anything in common (cosine 0).

  Raises:
    ValueError: no embedding, one that is not finite, or one of length zero.

  >>> round(vendi_score(np.ones((5, 3))), 6), round(vendi_score(np.eye(4)), 6)
  (1.0, 4.0)
  """
  x = _checked(embeddings, least=1)
  lengths = np.linalg.norm(x, axis=1, keepdims=True)
  if not lengths.all():
    raise ValueError(
      f"embeddings[{int(np.argmin(lengths))}] is zero, and has no direction; expected another one"
    )
  # K = Y Y^T of the unit rows Y, so its eigenvalues are the squares of Y's singular values.
  eigenvalues = np.linalg.svd(x / lengths, compute_uv=False) ** 2 / len(x)
  eigenvalues = eigenvalues[eigenvalues > 0]  # 0 log 0 = 0
  return float(np.exp(-(eigenvalues * np.log(eigenvalues)).sum()))


def mean_pairwise_distance(embeddings: Float[np.ndarray, "n d"]) -> float:
  """The mean Euclidean distance over the n (n - 1) / 2 pairs.

  Of embeddings of length 1, as CLIP's are here, it is between 0 and 2, and sqrt(2) where they have
  nothing in common. Latents are not of length 1: compare only those of one size and one VAE.

  Raises:
    ValueError: fewer than two embeddings, or one that is not finite.

  >>> mean_pairwise_distance(np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]))
  3.3333333333333335
  """
  x = _checked(embeddings, least=2)
  # Row by row: by the products x_i . x_j, near images would lose half of their digits.
  total = sum(np.linalg.norm(x[i + 1 :] - x[i], axis=1).sum() for i in range(len(x) - 1))
  return float(total / (len(x) * (len(x) - 1) / 2))


def _checked(embeddings, least):
  x = np.asarray(embeddings, np.float64)
  if x.ndim != 2 or len(x) < least:
    raise ValueError(f"embeddings: shape {x.shape}; expected [n, d] with n of at least {least}")
  if not np.isfinite(x).all():
    row = int(np.argmin(np.isfinite(x).all(axis=1)))
    raise ValueError(f"embeddings[{row}] is not finite; expected finite numbers")
  return x
