"""Preference losses: four error arrays in, one loss per pair out.

An error is the **mean** over H, W, C of the squared difference between a network's output and its
target, in float32, one number per latent. Winner and loser of a pair share timestep and noise, and
so do policy and reference. All losses here see the errors only through the margin (SePPO's with the
loser's part turned round where the winner is not yet passed)

    u = -kappa [(err_w - ref_err_w) - (err_l - ref_err_l)],    kappa = beta / 2

which is positive where the policy prefers the winner more than the reference does, and exactly 0
where policy and reference are the same network. p = sigmoid(u) is the policy's preference.

Why the mean and why beta / 2: Diffusion-DPO (arXiv 2311.12908) writes beta T omega(lambda_t) before
*summed* errors, but its code (SalesforceAIResearch/DiffusionDPO, train.py) and those derived from
it use `-0.5 * beta` before *mean* errors and drop T and omega. Published betas refer to that form.
It equals beta / (2 N) before summed errors, N the elements of a latent: a published beta on summed
errors is N times too strong (16,384 times for a 4 x 64 x 64 latent). The mean also keeps beta's
meaning when the latent changes size. (diffusers' example script omits the 1/2: its beta of 2,500 is
5,000 here.)

Every loss returns `(loss, parts)`, both per pair; the caller reduces. Settings are Python numbers,
checked when the function is traced.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmpo_jax import divergences

# IPO's regression target in units of the margin; `ipo_loss` derives it.
_IPO_TARGET = 0.5

# `peak_gradient_weight` looks at margins up to here in steps of 1 / 128. Where a weight has a peak
# it lies well inside: a float32 sigmoid rounds to 1 from u = 17 on.
_REACH = 64


class LossParts(NamedTuple):
  """What a loss tells the log about each pair. No gradient flows through any of it.

  Attributes:
    margin: u, in nats; 0 where policy and reference agree.
    accuracy: 1 if u > 0, 0 if u < 0 and 0.5 if u == 0, so that a run starts at chance: at step 0
      every margin is exactly 0, which a plain `u > 0` would report as always wrong.
    winner_advantage: ref_err_w - err_w; positive = the policy denoises the winner better.
    loser_advantage: ref_err_l - err_l; positive = the policy denoises the loser better. A margin
      can grow while both advantages fall (likelihood displacement), so watch the two separately.
    gradient_weight: |dL/du|, the pair's say in the update.
    flipper: SePPO only, +1 where the second image counts as the loser, -1 as another winner.
  """

  margin: Float[Array, " B"]
  accuracy: Float[Array, " B"]
  winner_advantage: Float[Array, " B"]
  loser_advantage: Float[Array, " B"]
  gradient_weight: Float[Array, " B"]
  flipper: Float[Array, " B"] | None = None


def margin(
  err_w: Float[Array, " B"],
  err_l: Float[Array, " B"],
  ref_err_w: Float[Array, " B"],
  ref_err_l: Float[Array, " B"],
  *,
  beta: float,
) -> Float[Array, " B"]:
  """Margin by which the policy prefers the winner more than the reference does.

      u = beta / 2 * [(ref_err_w - err_w) - (ref_err_l - err_l)]

  Diffusion-DPO (arXiv 2311.12908) in the mean form of its public code; see the module docstring.

  Args:
    err_w: the policy's error on the winner, mean over H, W, C, float32, >= 0.
    err_l: the policy's error on the loser.
    ref_err_w: the reference's error on the winner. Receives no gradient.
    ref_err_l: the reference's error on the loser. Receives no gradient.
    beta: strength of the pull towards the reference, finite and > 0. Public runs: 2000 to 5000 for
      Stable Diffusion 1.5, 5000 to 6000 for SDXL.

  Returns:
    u in nats, any real number.

  Raises:
    ValueError: if beta is not a finite number > 0, or an error is in half precision.

  Here kappa = 4, and the policy beats the reference by 0.25 on the winner alone:

  >>> import jax.numpy as jnp
  >>> half = jnp.array([0.5])
  >>> print(margin(half - 0.25, half, half, half, beta=8.0))
  [1.]
  """
  _check_beta(beta)
  check_errors(err_w=err_w, err_l=err_l, ref_err_w=ref_err_w, ref_err_l=ref_err_l)
  ref_err_w, ref_err_l = jax.lax.stop_gradient((ref_err_w, ref_err_l))
  return 0.5 * beta * ((ref_err_w - err_w) - (ref_err_l - err_l))


def dmpo_loss(
  err_w: Float[Array, " B"],
  err_l: Float[Array, " B"],
  ref_err_w: Float[Array, " B"],
  ref_err_l: Float[Array, " B"],
  *,
  beta: float,
  alpha: float,
  p_choice: Float[Array, " B"] | None = None,
) -> tuple[Float[Array, " B"], LossParts]:
  """DMPO: reverse KL from the policy's preference to the smoothed label.

      L     = KL((p, 1-p) || (1-alpha, alpha))
            = p log(p / (1-alpha)) + (1-p) log((1-p) / alpha),      p = sigmoid(u)
      dL/du = p (1-p) (u - m),                                      m = log((1-alpha) / alpha)

  Method: arXiv 2507.07510. This formula is derived, not copied: the KL-regularised reward objective
  is a reverse KL to its own optimum; self-normalised over two samples, which is exact only in the
  limit of many, it is the two-point KL above (the loss of EXO, arXiv 2402.00856); Diffusion-DPO's
  argument gives u. The formula agrees with an independent public implementation
  (AIDC-AI/Diffusion-SDPO, train.py, `--train_method dmpo`).

  The loss is 0.5 log(1 / (4 alpha (1-alpha))) at the reference and 0 at its only minimum, u = m.
  Beyond m the gradient pulls back, which DPO without label smoothing never does. It vanishes on
  both tails: a pair far on the wrong side, u < -6 at alpha = 0.01, is given up, where DPO pushes on
  with weight 1.

  Args:
    err_w, err_l, ref_err_w, ref_err_l, beta: as in `margin`.
    alpha: the loser's mass in the smoothed label, in (0, 0.5). Public baselines use 0.01.
    p_choice: soft labels: the probability, [0.5, 1], that people choose the winner. The loser's
      mass is then max(alpha, 1 - p_choice), each pair's own, and the target margin m the log-odds
      of the choice: alpha bounds how sure a label may be. None: as sure as alpha allows.

  Returns:
    The loss in nats, in [0, -log(alpha)], and its parts.

  Raises:
    ValueError: if alpha is outside (0, 0.5), or as in `margin`.

  At the reference, with alpha = 0.1, the loss is log(1 / sqrt(4 * 0.1 * 0.9)) = log(1 / 0.6), and
  the gradient weight log(0.9 / 0.1) / 4:

  >>> import jax.numpy as jnp
  >>> err = jnp.array([0.2])
  >>> loss, parts = dmpo_loss(err, err, err, err, beta=2000.0, alpha=0.1)
  >>> print(f"{loss[0]:.4f} {parts.gradient_weight[0]:.4f}")
  0.5108 0.5493
  """
  _check_alpha(alpha)
  u = margin(err_w, err_l, ref_err_w, ref_err_l, beta=beta)
  p, log_p, one_minus_p, log_one_minus_p = _preference(u)
  mass = _loser_mass(alpha, p_choice)
  log_q_w, log_q_l = jnp.log1p(-mass), jnp.log(mass)
  loss = p * (log_p - log_q_w) + one_minus_p * (log_one_minus_p - log_q_l)
  slope = p * one_minus_p * (u - (log_q_w - log_q_l))
  return loss, _collect_parts(u, slope, err_w, err_l, ref_err_w, ref_err_l)


def dpo_loss(
  err_w: Float[Array, " B"],
  err_l: Float[Array, " B"],
  ref_err_w: Float[Array, " B"],
  ref_err_l: Float[Array, " B"],
  *,
  beta: float,
  label_smoothing: float,
  p_choice: Float[Array, " B"] | None = None,
) -> tuple[Float[Array, " B"], LossParts]:
  """Diffusion-DPO: cross-entropy of the policy's preference against the label.

      L     = -(1-s) log p - s log(1-p),      p = sigmoid(u),  s = label_smoothing
      dL/du = s p - (1-s) (1-p)

  Diffusion-DPO (arXiv 2311.12908); s > 0 is the conservative DPO for labels wrong with
  probability s. Up to the label's entropy it is the forward KL to the label that `dmpo_loss` takes
  in reverse.

  Args:
    err_w, err_l, ref_err_w, ref_err_l, beta: as in `margin`.
    label_smoothing: the loser's mass in the label, in [0, 0.5). 0 is Diffusion-DPO itself.
    p_choice: soft labels as in `dmpo_loss`, s = max(label_smoothing, 1 - p_choice).

  Returns:
    The loss in nats, log 2 at the reference, growing like (1-s) |u| on misranked pairs; and its
    parts.

  Raises:
    ValueError: if label_smoothing is outside [0, 0.5), or as in `margin`.

  At the reference the policy's preference is a coin flip, log 2 nats from any label:

  >>> import jax.numpy as jnp
  >>> err = jnp.array([0.2])
  >>> loss, parts = dpo_loss(err, err, err, err, beta=2000.0, label_smoothing=0.0)
  >>> print(f"{loss[0]:.4f} {parts.gradient_weight[0]}")
  0.6931 0.5
  """
  _check_label_smoothing(label_smoothing)
  u = margin(err_w, err_l, ref_err_w, ref_err_l, beta=beta)
  mass = _loser_mass(label_smoothing, p_choice)
  keep = 1.0 - mass
  loss = -keep * jax.nn.log_sigmoid(u) - mass * jax.nn.log_sigmoid(-u)
  slope = mass * jax.nn.sigmoid(u) - keep * jax.nn.sigmoid(-u)
  return loss, _collect_parts(u, slope, err_w, err_l, ref_err_w, ref_err_l)


def ipo_loss(
  err_w: Float[Array, " B"],
  err_l: Float[Array, " B"],
  ref_err_w: Float[Array, " B"],
  ref_err_l: Float[Array, " B"],
  *,
  beta: float,
) -> tuple[Float[Array, " B"], LossParts]:
  """IPO: squared distance of the margin from a fixed target.

      L     = (u - 1/2)^2
      dL/du = 2 (u - 1/2)

  IPO (Azar et al., arXiv 2310.12036) regresses h, the log-ratio of policy to reference on the
  winner minus that on the loser, onto 1 / (2 tau), tau being the factor of the KL penalty. That
  factor is DPO's beta, and DPO's margin is beta h: in the mean form h is half the gap of advantages
  (ref_err_w - err_w) - (ref_err_l - err_l), and u = kappa gap = beta h. With tau = beta,

      (h - 1 / (2 tau))^2 = (u - 1/2)^2 / tau^2

  The constant 1 / tau^2 is dropped, so that the slope at the reference is -1 whatever beta is and
  learning rates stay comparable with the other losses. The minimum is where the gap equals
  1 / (2 kappa) = 1 / beta. A second setting for the target would add nothing: moving it to c is the
  same loss at beta / (2 c), rescaled.

  Args:
    err_w, err_l, ref_err_w, ref_err_l: as in `margin`.
    beta: as in `margin`; IPO's tau. The larger, the smaller the gap that is asked for.

  Returns:
    The loss, >= 0, 1/4 at the reference, unbounded; and its parts.

  Raises:
    ValueError: as in `margin`.

  With beta = 4 the target gap is 1/4. At gap 0 the loss is (1/2)^2, at the target 0:

  >>> import jax.numpy as jnp
  >>> half = jnp.array([0.5, 0.5])
  >>> loss, parts = ipo_loss(jnp.array([0.5, 0.25]), half, half, half, beta=4.0)
  >>> print(loss, parts.gradient_weight)
  [0.25 0.  ] [1. 0.]
  """
  u = margin(err_w, err_l, ref_err_w, ref_err_l, beta=beta)
  residual = u - _IPO_TARGET
  return residual**2, _collect_parts(u, 2.0 * residual, err_w, err_l, ref_err_w, ref_err_l)


def seppo_loss(
  err_w: Float[Array, " B"],
  err_l: Float[Array, " B"],
  ref_err_w: Float[Array, " B"],
  ref_err_l: Float[Array, " B"],
  *,
  beta: float,
) -> tuple[Float[Array, " B"], LossParts]:
  """SePPO: the second image, drawn by the reference, is a loser or another winner.

      s     = +1 where err_w <= ref_err_w, else -1
      u     = beta / 2 [(ref_err_w - err_w) - s (ref_err_l - err_l)]
      L     = -log sigmoid(u)
      dL/du = -sigmoid(-u)

  SePPO (arXiv 2410.05255), its anchor-based adaptive flipper s: where the policy denoises the
  winner (the anchor) no worse than the reference, it has passed it, and what the reference drew is
  pushed away as in Diffusion-DPO; where it is worse, what the reference drew may be better than
  what the policy would, and is drawn near as the winner is. s is a constant to the gradient.

  The paper has sign(ref_err_w - err_w) and says nothing of 0, which is exactly what every pair has
  whenever the policy is the reference: at the first step, and in each round that draws the newest
  checkpoint. Chosen here: +1. With 0 the second image would take no part in that update.

  Args:
    err_w, ref_err_w: on the winner, as in `margin`.
    err_l, ref_err_l: on the image that the reference drew for the caption.
    beta: as in `margin`.

  Returns:
    The loss in nats, log 2 at the reference; and its parts, with u as the margin.

  Raises:
    ValueError: as in `margin`.

  With kappa = 1, both errors 1 below the reference's: the winner is passed, and the second image
  counts against it. Both 1 above: it is not, and the second image counts as the winner does.

  >>> import jax.numpy as jnp
  >>> err, ref_err = jnp.array([1.0, 3.0]), jnp.array([2.0, 2.0])
  >>> _, parts = seppo_loss(err, err, ref_err, ref_err, beta=2.0)
  >>> print(parts.flipper, parts.margin)
  [ 1. -1.] [ 0. -2.]
  """
  flipper = jax.lax.stop_gradient(jnp.where(err_w <= ref_err_w, 1.0, -1.0))
  # The margin is linear in the loser's errors: with both flipped, so is their difference.
  u = margin(err_w, flipper * err_l, ref_err_w, flipper * ref_err_l, beta=beta)
  parts = _collect_parts(u, -jax.nn.sigmoid(-u), err_w, err_l, ref_err_w, ref_err_l)
  return -jax.nn.log_sigmoid(u), parts._replace(flipper=flipper)


def fpo_loss(
  err_w: Float[Array, " B"],
  err_l: Float[Array, " B"],
  ref_err_w: Float[Array, " B"],
  ref_err_l: Float[Array, " B"],
  *,
  beta: float,
  alpha: float,
  divergence: str,
  a: float | None = None,
  p_choice: Float[Array, " B"] | None = None,
) -> tuple[Float[Array, " B"], LossParts]:
  """f-PO: an f-divergence between the policy's preference and the smoothed label.

      L     = sum_i q_i f(p_i / q_i)                    p_i in (p, 1-p),  q_i in (1-alpha, alpha)
      dL/du = p (1-p) [f'(p / (1-alpha)) - f'((1-p) / alpha)]

  f-PO (arXiv 2410.21662) for language models; u in place of its log-ratios is our extension. It
  and its code have the first six rows of

      divergence     f(x)                                   L
      fkl            -log x + x - 1                         KL(q || p), DPO up to a constant
      rkl            x log x - x + 1                        KL(p || q), DMPO
      alpha          [x^(1-a) - (1-a) x - a] / (a (a-1))    a -> 0: rkl, a -> 1: fkl
      js             x/2 log x - (1+x)/2 log((1+x)/2)       Jensen-Shannon, <= log 2
      jeffreys       (x - 1) log x                          fkl + rkl
      sq_hellinger   (sqrt x - 1)^2                         sum (sqrt p - sqrt q)^2
      pearson_chi2   (x - 1)^2                              sum (p - q)^2 / q
      neyman_chi2    (x - 1)^2 / x                          sum (p - q)^2 / p
      tv             |x - 1| / 2                            |p - (1-alpha)|
      le_cam         (x - 1)^2 / (x + 1) / 2                sum (p - q)^2 / (p + q) / 2

  All are 0 at u = log((1-alpha) / alpha) and nowhere else, but their scales differ: at alpha = 0.01
  the slope at the reference runs from -0.13 (js) to -24.75 (pearson_chi2, through 1 / alpha), so a
  learning rate does not carry over. neyman_chi2, and alpha with a > 1, grow like e^((a-1) |u|), a
  being 2 for neyman_chi2: they leave float32 at (a-1) |u| of about 88, where loss and gradient
  become infinite (not NaN). The others are finite at any margin; for a < 0 that needs alpha^a below
  float32's 3e38.

  Args:
    err_w, err_l, ref_err_w, ref_err_l, beta: as in `margin`.
    alpha: the loser's mass in the smoothed label, in (0, 0.5), as in `dmpo_loss`.
    divergence: one of `divergences.NAMES`.
    a: order of the alpha-divergence, any finite number; not `alpha`. Given exactly when
      divergence is "alpha".
    p_choice: soft labels, as in `dmpo_loss`.

  Returns:
    The loss, >= 0 (nats where logarithms enter), and its parts.

  Raises:
    ValueError: if divergence is unknown, if a is missing, superfluous or not finite, if alpha is
      outside (0, 0.5), or as in `margin`.

  At the reference p = 1/2. With alpha = 0.1 the total variation is 0.9 - 0.5, and Pearson's
  chi-squared 0.4^2 / 0.9 + 0.4^2 / 0.1 = 16/9:

  >>> import jax.numpy as jnp
  >>> err = jnp.array([0.2])
  >>> for divergence in ("tv", "pearson_chi2"):
  ...   loss, _ = fpo_loss(err, err, err, err, beta=2000.0, alpha=0.1, divergence=divergence)
  ...   print(f"{loss[0]:.4f}")
  0.4000
  1.7778
  """
  _check_alpha(alpha)
  chosen = divergences.choose(divergence, a)
  u = margin(err_w, err_l, ref_err_w, ref_err_l, beta=beta)
  p, log_p, one_minus_p, log_one_minus_p = _preference(u)
  mass = _loser_mass(alpha, p_choice)
  winner = divergences.Masses(p, log_p, 1.0 - mass, jnp.log1p(-mass))
  loser = divergences.Masses(one_minus_p, log_one_minus_p, mass, jnp.log(mass))
  loss = chosen.term(winner) + chosen.term(loser)
  slope = one_minus_p * chosen.weighted_derivative(winner) - p * chosen.weighted_derivative(loser)
  return loss, _collect_parts(u, slope, err_w, err_l, ref_err_w, ref_err_l)


def peak_gradient_weight(loss: Callable[..., tuple[Array, LossParts]]) -> float:
  """Largest gradient weight |dL/du| that a loss gives to any pair.

  The yardstick for a pair's own `gradient_weight`: one far below it lies in the loss's dead zone
  and takes no part in the update, be it given up on the left or finished at the minimum. Found by
  evaluating the loss on margins from -64 to 64, once and outside of any trace, so that a jitted
  function may call it.

  A weight still growing at the end of that range has no peak (`ipo_loss`; `fpo_loss` with
  neyman_chi2, or with alpha and a > 1). Its yardstick is the weight at the reference, u = 0, which
  is what every pair starts with.

  Args:
    loss: one of this module's losses with its settings bound, as by `functools.partial`.

  Returns:
    The peak, a Python float > 0, exact to about 1e-4.

  DPO's weight is sigmoid(-u), IPO's 2 |u - 1/2|:

  >>> import functools
  >>> peak_gradient_weight(functools.partial(dpo_loss, beta=2000.0, label_smoothing=0.0))
  1.0
  >>> peak_gradient_weight(functools.partial(ipo_loss, beta=2000.0))
  1.0
  """

  @jax.jit
  def weigh(u):
    zeros = jnp.zeros_like(u)
    # The margin is linear in the errors, so its value at a unit of error is kappa.
    _, unit = loss(zeros, zeros + 1.0, zeros, zeros)
    _, parts = loss(zeros, u / unit.margin, zeros, zeros)
    return parts.gradient_weight

  with jax.ensure_compile_time_eval():
    weight = weigh(jnp.linspace(-_REACH, _REACH, 256 * _REACH + 1))
    far_left, left, centre, right, far_right = weight[:: 64 * _REACH].tolist()
    peak = float(weight.max())
  # One per cent is far above float32's noise and far below any growth that matters.
  growing = max(far_left, far_right) > 1.01 * max(left, right)
  return centre if growing or math.isinf(peak) else peak


def _loser_mass(floor: float, p_choice: Array | None) -> Array | float:
  """The loser's mass in the label: `floor`, or more where people disagree."""
  return floor if p_choice is None else jnp.maximum(floor, 1.0 - p_choice)


def _preference(u: Array) -> tuple[Array, Array, Array, Array]:
  """p = sigmoid(u), log p, 1 - p and log(1 - p), each and its gradient exact on both tails.

  Not jnp.log(p), which is infinite once p underflows; and not jax.nn.sigmoid, whose gradient
  s (1 - s) cancels as s rounds to 1 and so loses the misranked pairs' share in 1 - p.
  """
  log_p, log_one_minus_p = jax.nn.log_sigmoid(u), jax.nn.log_sigmoid(-u)
  return jnp.exp(log_p), log_p, jnp.exp(log_one_minus_p), log_one_minus_p


def _collect_parts(
  u: Array, slope: Array, err_w: Array, err_l: Array, ref_err_w: Array, ref_err_l: Array
) -> LossParts:
  parts = LossParts(
    margin=u,
    accuracy=0.5 * (1.0 + jnp.sign(u)),
    winner_advantage=ref_err_w - err_w,
    loser_advantage=ref_err_l - err_l,
    gradient_weight=jnp.abs(slope),
  )
  return jax.lax.stop_gradient(parts)


def check_errors(**errors: Array) -> None:
  """Refuses errors in half precision.

  Raises:
    ValueError: one is not float32 (or float64, in tests); it is named.
  """
  for name, err in errors.items():
    if err.dtype.name not in ("float32", "float64"):
      raise ValueError(
        f"{name}: expected float32, got {err.dtype}. kappa is in the thousands and magnifies the "
        "rounding of an error; subtract, square and average in float32."
      )


def _check_beta(beta: float) -> None:
  if not (math.isfinite(beta) and beta > 0):
    raise ValueError(
      f"beta: expected a finite number > 0, got {beta}. It is the strength of the pull towards the "
      "reference; for mean errors public runs use 2000 to 6000."
    )


def _check_alpha(alpha: float) -> None:
  if not 0 < alpha < 0.5:
    raise ValueError(
      f"alpha: expected a number in (0, 0.5), got {alpha}. It is the loser's mass in the smoothed "
      "label (1 - alpha, alpha): at 0 the target margin is infinite, at 0.5 the label says "
      "nothing, above that it prefers losers. Public baselines use 0.01."
    )


def _check_label_smoothing(label_smoothing: float) -> None:
  if not 0 <= label_smoothing < 0.5:
    raise ValueError(
      f"label_smoothing: expected a number in [0, 0.5), got {label_smoothing}. It is the "
      "probability that a label is wrong; 0 is Diffusion-DPO, at 0.5 the label says nothing."
    )
