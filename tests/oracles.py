"""What the losses should be, in float64 NumPy straight from the formulas.

Slow, short and independent: nothing here imports dmpo_jax or looks after extreme arguments. Margins
between -30 and 30 are safe.
"""

import numpy as np


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
