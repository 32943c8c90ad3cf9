"""What the losses should be, in float64 NumPy straight from the formulas.

Slow, short and independent: nothing here imports dmpo_jax or looks after extreme arguments. Margins
between -30 and 30 are safe.
"""

import numpy as np
from scipy import special


def margin(err_w, err_l, ref_err_w, ref_err_l, *, beta):
  """Diffusion-DPO's code: scale_term * (model_diff - ref_diff), scale_term = -beta / 2."""
  model_diff = np.float64(err_w) - np.float64(err_l)
  ref_diff = np.float64(ref_err_w) - np.float64(ref_err_l)
  return -0.5 * beta * (model_diff - ref_diff)


def preference(u):
  """The policy's masses on (winner preferred, loser preferred), stacked on the last axis."""
  u = np.asarray(u, np.float64)
  return np.stack([1 / (1 + np.exp(-u)), 1 / (1 + np.exp(u))], axis=-1)


def smoothed_label(alpha):
  return np.array([1 - alpha, alpha])


def entropy(masses):
  return -np.sum(masses * np.log(masses), axis=-1)


def kl(p, q):
  """KL(p || q) over the last axis, from its definition."""
  return np.sum(p * np.log(p / q), axis=-1)


def dmpo(u, alpha):
  return kl(preference(u), smoothed_label(alpha))


def dpo(u, label_smoothing):
  """Cross-entropy of the preference against the label."""
  return -np.sum(smoothed_label(label_smoothing) * np.log(preference(u)), axis=-1)


def ipo(h, tau):
  """Azar et al.: squared distance of a difference of log-ratios h from 1 / (2 tau)."""
  return (h - 1 / (2 * tau)) ** 2


def seppo(err_w, err_l, ref_err_w, ref_err_l, *, beta):
  """SePPO: -log sigmoid(-beta / 2 [(e_a - r_a) - s (e_s - r_s)]), s = sign(r_a - e_a), 1 at 0."""
  e_a, e_s, r_a, r_s = map(np.float64, (err_w, err_l, ref_err_w, ref_err_l))
  s = np.where(r_a - e_a == 0, 1.0, np.sign(r_a - e_a))
  u = -0.5 * beta * ((e_a - r_a) - s * (e_s - r_s))
  return u, s, -np.log(preference(u)[..., 0])


GENERATORS = {
  "fkl": lambda x: -np.log(x) + x - 1,
  "rkl": lambda x: x * np.log(x) - x + 1,
  "js": lambda x: 0.5 * x * np.log(x) - (1 + x) / 2 * np.log((1 + x) / 2),
  "jeffreys": lambda x: (x - 1) * np.log(x),
  "sq_hellinger": lambda x: (np.sqrt(x) - 1) ** 2,
  "pearson_chi2": lambda x: (x - 1) ** 2,
  "neyman_chi2": lambda x: (x - 1) ** 2 / x,
  "tv": lambda x: 0.5 * np.abs(x - 1),
  "le_cam": lambda x: 0.5 * (x - 1) ** 2 / (x + 1),
}


def alpha_generator(a):
  """Generator of the alpha-divergence of order a, a not in {0, 1}."""
  return lambda x: (x ** (1 - a) - (1 - a) * x - a) / (a * (a - 1))


def f_divergence(p, q, generator):
  """sum_i q_i f(p_i / q_i) over the last axis, for any number of outcomes."""
  return np.sum(q * generator(p / q), axis=-1)


def fpo(u, alpha, generator):
  return f_divergence(preference(u), smoothed_label(alpha), generator)


def slope(function, u, step=1e-5):
  """Central difference; in float64 good to about 1e-9 of the function's scale."""
  u = np.asarray(u, np.float64)
  return (function(u + step) - function(u - step)) / (2 * step)


def softmax(log_weights):
  """Masses proportional to exp(log_weights) over the last axis."""
  shifted = np.exp(log_weights - np.max(log_weights, axis=-1, keepdims=True))
  return shifted / np.sum(shifted, axis=-1, keepdims=True)


def mapo(err_w, err_l, *, beta_mapo, snr_value):
  """mapo-t2i/mapo: the winner's error less beta times the log-sigmoid of 1000 log-odds."""

  def odds(err):
    x = snr_value * np.float64(err)
    return x / np.expm1(x)

  u = 1000 * (odds(err_w) - odds(err_l))
  return np.float64(err_w) + beta_mapo * np.log1p(np.exp(-u)), u


KTO_UTILITIES = {
  "sigmoid": lambda v: 1 / (1 + np.exp(-v)),
  "loss_averse": lambda v: -np.log1p(np.exp(-v)),
  "risk_seeking": lambda v: np.log1p(np.exp(v)),
}


def kto(err, ref_err, desirable, *, kappa, weights, utility):
  """jacklishufan/diffusion-kto: weight (1 - U(+-kappa (gain less the mean gain, if positive)))."""
  gain = np.float64(ref_err) - np.float64(err)
  sign = np.where(desirable, 1, -1)
  v = sign * kappa * (gain - max(0.0, gain.mean()))
  return np.where(desirable, *weights) * (1 - KTO_UTILITIES[utility](v)), v


def loser_scale(residual_w, residual_l, mu):
  """AIDC-AI/Diffusion-SDPO for one pair, from the gradients of the two means of squares."""
  g_w = 2 * np.float64(residual_w).ravel() / residual_w.size
  g_l = 2 * np.float64(residual_l).ravel() / residual_l.size
  return min(1.0, (1 - mu) * (g_w @ g_w) / (g_l @ g_w)) if g_l @ g_w > 0 else 1.0


def niqe_luminance(pixels):
  """ITU-R BT.601, to the nearest of 256 levels, halves up."""
  r, g, b = np.moveaxis(pixels.astype(np.float64), -1, 0)
  return np.floor((299 * r + 587 * g + 114 * b) / 1000 + 0.5)


def niqe_mscn(x):
  """BRISQUE's equations 1 to 3, over all 49 places of the window at once; and sigma."""
  i, j = np.mgrid[-3:4, -3:4]
  weights = np.exp(-(i**2 + j**2) / (2 * (7 / 6) ** 2))
  weights /= weights.sum()
  padded = np.pad(x, 3, mode="edge")
  around = np.lib.stride_tricks.sliding_window_view(padded, (7, 7))
  # Opposite places together: of what is point-symmetric about x, flat regions above all, the sum
  # of differences is exactly 0.
  apart = (weights * (around + around[..., ::-1, ::-1] - 2 * x[..., None, None])).sum((-2, -1)) / 2
  variance = (weights * (around - (x + apart)[..., None, None]) ** 2).sum((-2, -1))
  return -apart / (np.sqrt(variance) + 1), np.sqrt(variance)


def niqe_half(x):
  """Half the size along the first axis: cubic kernel of Keys at twice its width, mirrored ends."""

  def cubic(t):
    t = np.abs(t)
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return np.where(t <= 1, near, np.where(t <= 2, far, 0))

  n = len(x)
  matrix = np.zeros((n // 2, n))
  for row in range(n // 2):
    for place in range(2 * row - 3, 2 * row + 5):
      inside = min(place if place >= 0 else -1 - place, 2 * n - 1 - place)
      matrix[row, inside] += cubic((place - 2 * row - 0.5) / 2) / 2
  return matrix @ x


def niqe_aggd(x):
  """NIQE's equations 7 and 8 by BRISQUE's moments: shape (of the grid), left, right beta, mean."""
  x = x.ravel()
  if not x.any():
    return 0.2, 0.0, 0.0, 0.0
  left, right = (np.sqrt(np.mean(side**2)) if side.size else 0.0 for side in (x[x < 0], x[x > 0]))
  ratio = np.mean(np.abs(x)) ** 2 / np.mean(x**2)
  ratio *= (left**3 + right**3) * (left + right) / (left**2 + right**2) ** 2
  grid = np.arange(200, 10001) / 1000
  one, two, three = (special.gamma(n / grid) for n in (1, 2, 3))
  k = np.argmin(np.abs(two**2 / (one * three) - ratio))
  beta_left, beta_right = (side * np.sqrt(one[k] / three[k]) for side in (left, right))
  return grid[k], beta_left, beta_right, (beta_right - beta_left) * two[k] / one[k]


def niqe_features(pixels, side):
  """The 36 features of each patch of side x side pixels, and the patches' sharpness."""
  rows, columns = (n // side for n in pixels.shape[:2])
  x = niqe_luminance(pixels[: rows * side, : columns * side])
  features = [[] for _ in range(rows * columns)]
  for size in (side, side // 2):
    mscn, sigma = niqe_mscn(x)
    if size == side:
      sharpness = []
    for k in range(rows * columns):
      top, left = k // columns * size, k % columns * size
      patch = mscn[top : top + size, left : left + size]
      if size == side:
        sharpness.append(sigma[top : top + size, left : left + size].mean())
      shape, low, high, _ = niqe_aggd(patch)
      features[k] += [shape, (low + high) / 2]
      i, j = np.mgrid[:size, :size]
      for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        other = patch[(i - down) % size, (j - right) % size]
        shape, low, high, mean = niqe_aggd(patch * other)
        features[k] += [shape, mean, low, high]
    x = niqe_half(niqe_half(x).T).T
  return np.array(features), np.array(sharpness)


def niqe_distance(features, mean, covariance):
  """NIQE's equation 10, by a linear system: for covariances that have an inverse."""
  centred = features - features.mean(0)
  own = centred.T @ centred / (len(features) - 1) if len(features) > 1 else 0
  apart = features.mean(0) - mean
  return np.sqrt(apart @ np.linalg.solve((own + covariance) / 2, apart))
