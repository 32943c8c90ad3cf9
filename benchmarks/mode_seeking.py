"""What each divergence makes of a target it cannot match, exactly: the figures of one document.

    python benchmarks/mode_seeking.py --out docs    # 2 minutes on 2 cores

A single Gaussian is fitted to mixtures of known density, so that every expectation is a sum over
a grid and nothing is sampled but where it says so. Everything is float64. The losses are those that
are trained with: `divergences.f_divergence` over whole laws, `losses.dmpo_loss` and its siblings
over pairs. docs/mode_seeking.md has the figures and says what they mean.
"""

import argparse
import functools
import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib import colors
from matplotlib import figure as mpl_figure

from dmpo_jax import divergences, figures, losses, report_style

# One dimension: two modes, and a Gaussian that has room for one.
WEIGHTS, MEANS, SD = (0.65, 0.35), (3.0, -3.0), 0.6
X = np.linspace(-14.0, 14.0, 1401)
REFERENCE = (0.0, 4.0)  # mean and sd of the law that pairs are drawn from; it covers both modes
REFERENCES = (REFERENCE, (0.0, 3.0), (0.0, 6.0), (2.0, 4.0), (3.0, 2.0))
PAIR_X = np.linspace(-14.0, 14.0, 141)  # pairs are all pairs of these: an expectation, no samples
STARTS = ((0.0, 2.0), (-2.0, 1.0))  # mean and sd: on the fence, and on the smaller mode
RATE, STEPS = 0.05, 600  # of gradient descent, after division by f''(1); norm clipped at 1
HARD_ALPHA = 0.01  # what public baselines use for DMPO
SOFT_ALPHA = 1e-9  # so small that a soft label is people's choice itself

# Two dimensions: three modes of unequal weight.
WEIGHTS_2D = (0.5, 0.3, 0.2)
MEANS_2D = ((2.4, 1.6), (-2.4, 1.6), (0.0, -2.6))
SD_2D = 0.6
AXIS_2D = np.linspace(-6.0, 6.0, 121)
START_2D = ((0.5, 0.0), ((1.0, 0.0), (0.0, 1.0)))  # mean, lower factor of the covariance


class Divergence(NamedTuple):
  """A row of the table.

  Attributes:
    title: as people call it.
    settings: of `divergences.f_divergence` and `losses.fpo_loss`.
    curvature: f''(1). Close to the target all divergences are this times half of one and the same
      (chi-squared), so that dividing by it puts their rates on one footing.
    weight: r f''(r), r = policy / target: the say of one of the policy's own samples in the
      gradient, see `score_gradient`. None where f has no second derivative.
    formula: the same in letters.
  """

  title: str
  settings: dict
  curvature: float
  weight: Callable[[Array], Array] | None
  formula: str


DIVERGENCES = {
  "rkl": Divergence("reverse KL (DMPO)", {}, 1.0, jnp.ones_like, "1"),
  "fkl": Divergence("forward KL (DPO)", {}, 1.0, lambda r: 1 / r, "1/r"),
  "jeffreys": Divergence("Jeffreys", {}, 2.0, lambda r: 1 + 1 / r, "1 + 1/r"),
  "js": Divergence("Jensen-Shannon", {}, 0.25, lambda r: 0.5 / (1 + r), "1/(2 + 2r)"),
  "alpha": Divergence("alpha, a = 0.5", {"a": 0.5}, 1.0, lambda r: r**-0.5, "r^-0.5"),
  "sq_hellinger": Divergence("squared Hellinger", {}, 0.5, lambda r: 0.5 * r**-0.5, "r^-0.5 / 2"),
  "pearson_chi2": Divergence("Pearson chi-squared", {}, 2.0, lambda r: 2 * r, "2r"),
  "neyman_chi2": Divergence("Neyman chi-squared", {}, 2.0, lambda r: 2 * r**-2, "2/r^2"),
  "le_cam": Divergence("Le Cam", {}, 0.5, lambda r: 4 * r / (1 + r) ** 3, "4r/(1+r)^3"),
  "tv": Divergence("total variation", {}, 1.0, None, "none"),
}


def log_normal(x: Float[Array, " n"], mean, sd) -> Float[Array, " n"]:
  """Log-density but for the constant."""
  return -0.5 * ((x - mean) / sd) ** 2 - jnp.log(sd)


def log_target(x: Float[Array, " n"]) -> Float[Array, " n"]:
  parts = [jnp.log(w) + log_normal(x, m, SD) for w, m in zip(WEIGHTS, MEANS, strict=True)]
  return jnp.logaddexp(*parts)


def log_law(values: Float[Array, " n"]) -> Float[Array, " n"]:
  """A density on a grid as a law over its points.

  The floor keeps a narrow fit's tails off 0 log 0; a mass of e^-600 changes nothing.
  """
  return jax.nn.log_softmax(jnp.maximum(jax.nn.log_softmax(values), -600.0))


def exact_objective(name: str) -> Callable[[Array], Array]:
  """(mean, log sd) -> the divergence of the whole law from the whole target."""
  target = log_law(log_target(jnp.asarray(X)))

  def objective(params):
    policy = log_law(log_normal(jnp.asarray(X), params[0], jnp.exp(params[1])))
    return divergences.f_divergence(policy, target, divergence=name, **DIVERGENCES[name].settings)

  return objective


def pair_losses() -> dict[str, tuple[Callable, str]]:
  """Losses as a run is given them -> with which labels: hard (drawn) or soft (people's share)."""
  dmpo, dpo = (functools.partial(f, beta=2.0) for f in (losses.dmpo_loss, losses.dpo_loss))
  found = {
    "dmpo, soft labels": (functools.partial(dmpo, alpha=SOFT_ALPHA), "soft"),
    "dmpo, hard labels": (functools.partial(dmpo, alpha=HARD_ALPHA), "hard"),
    "dpo": (functools.partial(dpo, label_smoothing=0.0), "hard"),
    "ipo": (functools.partial(losses.ipo_loss, beta=2.0), "hard"),
  }
  for name in ("jeffreys", "js", "alpha", "sq_hellinger"):
    settings = {"alpha": SOFT_ALPHA, "divergence": name, **DIVERGENCES[name].settings}
    found[name] = (functools.partial(losses.fpo_loss, beta=2.0, **settings), "soft")
  return found


def pair_objective(
  loss: Callable, labels: str, reference: tuple[float, float] = REFERENCE
) -> Callable[[Array], Array]:
  """(mean, log sd) -> the mean loss over all pairs that the reference draws and people label.

  An error stands for a negative log-density: with kappa = 1 the margin is then the difference of
  log-ratios of policy and reference, as in the derivation of every one of these losses. People
  choose by the Bradley-Terry law of the reward log target / reference, whose best policy at beta 1
  is the target itself.
  """
  x = jnp.asarray(PAIR_X)
  log_reference = log_normal(x, *reference)
  reward, log_mass = log_target(x) - log_reference, log_law(log_reference)
  first, second = (index.ravel() for index in np.indices((len(PAIR_X), len(PAIR_X))))
  choice = jax.nn.sigmoid(reward[first] - reward[second])  # that people prefer the first
  weight = jnp.exp(log_mass[first] + log_mass[second])
  if labels == "hard":
    weight, more = 2.0 * weight * choice, {}  # the other half: the second was preferred
  else:  # once a pair, the winner first
    weight = jnp.where(first == second, weight, 2.0 * weight) * (choice >= 0.5)
    weight = jnp.where((choice == 0.5) & (first != second), 0.5 * weight, weight)  # came twice
    more = {"p_choice": choice}
  kept = np.flatnonzero(np.asarray(weight) > 0)
  first, second, weight = first[kept], second[kept], weight[kept]
  more = {name: value[kept] for name, value in more.items()}
  ref_err = -log_reference

  def objective(params):
    err = -log_normal(x, params[0], jnp.exp(params[1]))
    values, _ = loss(err[first], err[second], ref_err[first], ref_err[second], **more)
    return weight @ values

  return objective


def sampled_objective(name: str, count: int, draws: int, seed: int = 0) -> Callable[[Array], Array]:
  """(mean, log sd) -> the divergence between `count` self-normalised samples of the reference."""
  rng = np.random.default_rng(seed)
  x = jnp.asarray(rng.normal(*REFERENCE, size=(draws // count, count)))
  reference = log_normal(x, *REFERENCE)
  target = jax.nn.log_softmax(log_target(x) - reference)

  def objective(params):
    log_ratio = log_normal(x, params[0], jnp.exp(params[1])) - reference
    # The floor is that of `log_law`: no sample is given up so far that its logarithm is lost.
    policy = jnp.maximum(jax.nn.log_softmax(log_ratio), -600.0)
    settings = DIVERGENCES[name].settings
    return jnp.mean(divergences.f_divergence(policy, target, divergence=name, **settings))

  return objective


def minimise(objective: Callable, low=(-6.0, -1.5), high=(6.0, 1.8), points: int = 25, levels=30):
  """The lowest point of a box, (mean, sd): a grid that shrinks around its own lowest point.

  No derivative is asked for, so that total variation is treated like the others.
  """
  low, high = np.array(low), np.array(high)
  batched = jax.jit(lambda params: jax.lax.map(objective, params, batch_size=64))
  for _ in range(levels):
    axes = [np.linspace(a, b, points) for a, b in zip(low, high, strict=True)]
    params = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    values = np.asarray(batched(params))
    best = params[np.nanargmin(values)]
    reach = 0.35 * (high - low)
    low, high = best - reach, best + reach
    if reach.max() < 1e-7:
      break
  return best[0], math.exp(best[1])


def descend(objective: Callable, start, *, curvature: float = 1.0, steps: int = STEPS):
  """Gradient descent in (mean, log sd): the path as (mean, sd), its start first."""

  def step(params, _):
    gradient = jax.grad(objective)(params) / curvature
    gradient /= jnp.maximum(1.0, jnp.linalg.norm(gradient))
    return params - RATE * gradient, params

  first = jnp.array([start[0], math.log(start[1])])
  _, path = jax.jit(lambda first: jax.lax.scan(step, first, length=steps))(first)
  return np.stack([path[:, 0], np.exp(path[:, 1])], axis=1)


# Two dimensions, by exact scores


def log_target_2d(x: Float[Array, "n 2"]) -> Float[Array, " n"]:
  return jax.nn.logsumexp(_log_modes(x), axis=0)


def _log_modes(x: Float[Array, "n 2"]) -> Float[Array, "3 n"]:
  off = (x - jnp.array(MEANS_2D)[:, None]) / SD_2D
  return jnp.log(jnp.array(WEIGHTS_2D))[:, None] - 0.5 * jnp.square(off).sum(axis=2)


def target_score(x: Float[Array, "n 2"]) -> Float[Array, "n 2"]:
  """grad_x log target: the mean of the modes' own scores, by the chance that x is theirs."""
  pull = (jnp.array(MEANS_2D)[:, None] - x) / SD_2D**2
  return jnp.einsum("kn,knd->nd", jax.nn.softmax(_log_modes(x), axis=0), pull)


def whiten(x: Float[Array, "n 2"], mean: Array, factor: Array) -> Float[Array, "n 2"]:
  """z with x = mean + factor z; only the lower triangle of the factor is read."""
  first = (x[:, 0] - mean[0]) / factor[0, 0]
  return jnp.stack([first, (x[:, 1] - mean[1] - factor[1, 0] * first) / factor[1, 1]], axis=1)


def log_policy_2d(x: Float[Array, "n 2"], mean: Array, factor: Array) -> Float[Array, " n"]:
  z = whiten(x, mean, factor)
  return -0.5 * jnp.square(z).sum(axis=1) - jnp.log(jnp.abs(jnp.diag(factor))).sum()


def grid_2d() -> Float[Array, "n 2"]:
  return jnp.stack(jnp.meshgrid(AXIS_2D, AXIS_2D), axis=-1).reshape(-1, 2)


def objective_2d(name: str) -> Callable[[Array, Array], Array]:
  """(mean, lower factor) -> the divergence, on the grid."""
  x = grid_2d()
  target = log_law(log_target_2d(x))

  def objective(mean, factor):
    policy = log_law(log_policy_2d(x, mean, factor))
    return divergences.f_divergence(policy, target, divergence=name, **DIVERGENCES[name].settings)

  return objective


def score_gradient(name: str, mean: Array, factor: Array) -> tuple[Array, Array]:
  """Gradient of the divergence by mean and factor, from scores alone.

      grad D = E_policy[ w(r) (score_policy - score_target) dx ],   w(r) = r f''(r),  r = p / q

  with x = mean + factor z, so that dx is 1 for the mean and z for the factor. From
  D = integral of q f(p / q): its gradient is E_policy[f'(r) grad log p], which is the mean of
  grad_x f'(r) along dx, and grad_x f'(r) = f''(r) r grad_x log r [derived].
  """
  x = grid_2d()
  log_p, log_q = log_law(log_policy_2d(x, mean, factor)), log_law(log_target_2d(x))
  z = whiten(x, mean, factor)
  second = -z[:, 1] / factor[1, 1]  # score = -z / factor, transposed: from the bottom up
  score = jnp.stack([(-z[:, 0] - factor[1, 0] * second) / factor[0, 0], second], axis=1)
  # Where r is beyond e^300 the other law has no mass to speak of.
  weight = DIVERGENCES[name].weight(jnp.exp(jnp.clip(log_p - log_q, -300.0, 300.0)))
  pull = (jnp.exp(log_p) * weight)[:, None] * (score - target_score(x))
  return pull.sum(axis=0), jnp.tril(pull.T @ z)


def descend_2d(name: str, steps: int = STEPS):
  """Gradient descent by exact scores: the means and factors along the path."""
  curvature = DIVERGENCES[name].curvature

  def step(state, _):
    gradient = jax.tree.map(lambda g: g / curvature, score_gradient(name, *state))
    norm = jnp.sqrt(sum(jnp.square(g).sum() for g in gradient))
    shrink = RATE / jnp.maximum(1.0, norm)
    return jax.tree.map(lambda p, g: p - shrink * g, state, gradient), state

  first = tuple(map(jnp.array, START_2D))
  _, path = jax.jit(lambda first: jax.lax.scan(step, first, length=steps))(first)
  return [np.asarray(each) for each in path]


# The direction of reinforcement learning, on nine states


class Directions(NamedTuple):
  """Gradients by the policy's logits.

  Attributes:
    rl: of -J(p_hat), J(p) = E_p[reward] - KL(p || reference).
    reverse, forward: of KL(p_hat || p_hat*) and KL(p_hat* || p_hat).
    sampled: K -> of the mean reverse and forward KL between K self-normalised samples.
  """

  rl: np.ndarray
  reverse: np.ndarray
  forward: np.ndarray
  sampled: dict[int, tuple[np.ndarray, np.ndarray]]


def rl_directions(
  counts=(2, 8, 64, 1024), *, states: int = 9, beta: float = 0.5, draws: int = 2**18, seed: int = 3
) -> Directions:
  """p_hat is proportional to policy^beta reference^(1 - beta), p_hat* to reference e^reward."""
  rng = np.random.default_rng(seed)
  reference = jax.nn.log_softmax(jnp.asarray(0.5 * rng.normal(size=states)))
  logits = reference + rng.normal(size=states) / beta
  reward = jnp.asarray(1.5 * rng.normal(size=states))
  best = jax.nn.log_softmax(reference + reward)

  def log_hat(logits):
    return jax.nn.log_softmax(beta * jax.nn.log_softmax(logits) + (1 - beta) * reference)

  def minus_j(logits):
    log_p = log_hat(logits)
    return jnp.exp(log_p) @ (log_p - reference - reward)

  def divergence(name, logits):
    return divergences.f_divergence(log_hat(logits), best, divergence=name)

  def sampled(name, samples, logits):
    log_ratio = beta * (jax.nn.log_softmax(logits) - reference)
    p, q = (jax.nn.log_softmax(values[samples]) for values in (log_ratio, reward))
    return jnp.mean(divergences.f_divergence(p, q, divergence=name))

  def gradient(objective):
    return np.asarray(jax.grad(objective)(logits))  # a jit would fold the samples as constants

  found = {}
  for count in counts:
    samples = rng.choice(states, p=np.exp(reference), size=(draws // count, count))
    found[count] = tuple(
      gradient(functools.partial(sampled, name, jnp.asarray(samples))) for name in ("rkl", "fkl")
    )
  whole = [gradient(functools.partial(divergence, name)) for name in ("rkl", "fkl")]
  return Directions(gradient(minus_j), *whole, found)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
  return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


# Pictures

_DPI = 150


def _canvas(columns: int, theme: str, rows: int = 1, inches=(3.1, 2.7)):
  palette = report_style.THEMES[theme]
  figure = mpl_figure.Figure(figsize=(columns * inches[0], rows * inches[1]), layout="constrained")
  figure.set_facecolor(palette.page)
  axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
  for each in axes:
    each.set_facecolor(palette.page)
    for spine in each.spines.values():
      spine.set_color(palette.line)
    each.tick_params(colors=palette.muted, labelsize=7, length=2)
  return figure, axes, palette


def _label(axes, palette, title: str, x: str = "", y: str = "") -> None:
  axes.set_title(title, loc="left", fontsize=8.5, fontweight="bold", color=palette.ink)
  axes.set_xlabel(x, fontsize=7.5, color=palette.muted)
  axes.set_ylabel(y, fontsize=7.5, color=palette.muted)


def landscape(objective: Callable, points=(49, 33)):
  """Values of an objective over mean and sd, with the axes."""
  means, log_sds = (
    np.linspace(-5, 5, points[0]),
    np.linspace(math.log(0.35), math.log(5), points[1]),
  )
  params = np.stack(np.meshgrid(means, log_sds), axis=-1).reshape(-1, 2)
  values = jax.jit(lambda params: jax.lax.map(objective, params, batch_size=64))(params)
  return means, np.exp(log_sds), np.asarray(values).reshape(points[1], points[0])


def _draw_landscape(axes, palette, surface, paths, best) -> None:
  means, sds, values = surface
  # Ten bands of equal area: the scales of the divergences differ by hundreds.
  levels = np.unique(np.quantile(values, np.linspace(0, 1, 11)))
  shades = colors.LinearSegmentedColormap.from_list("bands", [palette.validation, palette.page])
  norm = colors.BoundaryNorm(levels, 256)
  axes.contourf(means, sds, values, levels=levels, norm=norm, cmap=shades, alpha=0.55)
  for path in paths:
    axes.plot(path[:, 0], path[:, 1], color=palette.policy, linewidth=1.4)
    axes.plot(*path[0], "o", color=palette.policy, markersize=4)
    axes.plot(*path[-1], "s", color=palette.policy, markersize=4)
  axes.plot(*best, "*", color=palette.ink, markersize=9)
  axes.set_yscale("log")
  axes.set_yticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
  axes.minorticks_off()
  axes.set_xlim(-5, 5)
  axes.set_ylim(0.35, 5)


def _draw_densities(axes, palette, fits: dict[str, tuple]) -> None:
  x = np.linspace(-8, 8, 401)

  def normal(mean, sd):
    return np.exp(-0.5 * ((x - mean) / sd) ** 2) / (sd * math.sqrt(2 * math.pi))

  target = sum(w * normal(m, SD) for w, m in zip(WEIGHTS, MEANS, strict=True))
  axes.fill_between(x, target, color=palette.line)
  styles = [(palette.policy, "-"), (palette.validation, "--"), (palette.worse, ":")]
  for (name, fit), (colour, line) in zip(fits.items(), styles, strict=False):
    axes.plot(x, normal(*fit), line, color=colour, linewidth=1.5, label=name)
  axes.set_yticks([])
  axes.set_ylim(0, 0.9)
  legend = axes.legend(fontsize=7, frameon=False, loc="upper left")
  for entry in legend.get_texts():
    entry.set_color(palette.ink)


def draw_method(title: str, exact: dict | None, pairs: dict | None, theme: str) -> bytes:
  """Landscapes of a method with the paths of descent and the optimum, and the fits themselves."""
  parts = [("the whole law", exact), ("pairs (the loss of a run)", pairs)]
  parts = [(name, part) for name, part in parts if part is not None]
  figure, axes, palette = _canvas(len(parts) + 1, theme)
  for each, (name, part) in zip(axes, parts, strict=False):
    _draw_landscape(each, palette, part["surface"], part["paths"], part["best"])
    _label(each, palette, f"{title}: {name}", "mean", "sd")
  fits = {name.split(" (")[0]: part["best"] for name, part in parts}
  if exact is not None:
    fits["descent from the fence"] = exact["paths"][0][-1]
  _draw_densities(axes[-1], palette, fits)
  _label(axes[-1], palette, "target (grey) and fit", "x")
  return figures.png(figure, _DPI)


def draw_2d(paths: dict[str, list[np.ndarray]], theme: str) -> bytes:
  """Target and its scores, and each method's Gaussian on its way: ellipses of one and two sd."""
  figure, axes, palette = _canvas(2, theme, rows=2, inches=(3.4, 3.2))
  density = np.exp(np.asarray(log_target_2d(grid_2d()))).reshape(len(AXIS_2D), -1)
  shades = colors.LinearSegmentedColormap.from_list("density", [palette.page, palette.reference])
  arrows = np.stack(np.meshgrid(np.arange(-4, 4.1, 1), np.arange(-4, 4.1, 1)), -1).reshape(-1, 2)
  scores = np.asarray(target_score(jnp.asarray(arrows)))
  scores = scores / np.linalg.norm(scores, axis=1, keepdims=True)
  circle = np.stack([f(np.linspace(0, 2 * math.pi, 121)) for f in (np.cos, np.sin)])
  for each, (name, (means, factors)) in zip(axes, paths.items(), strict=True):
    each.contourf(AXIS_2D, AXIS_2D, density, levels=8, cmap=shades)
    each.quiver(
      *arrows.T, *scores.T, color=palette.muted, alpha=0.6, width=0.004, scale=30, headwidth=4
    )
    for position in (0, 20, 60, len(means) - 1):
      last = position == len(means) - 1
      for size in (1, 2) if last else (1,):
        outline = means[position][:, None] + size * np.tril(factors[position]) @ circle
        style = {"linewidth": 1.8} if last else {"linewidth": 0.8, "alpha": 0.7}
        each.plot(*outline, color=palette.policy, **style)
    each.plot(*means.T, color=palette.policy, linewidth=1.2)
    each.set_xlim(-4.6, 4.6)
    each.set_ylim(-4.6, 4.6)
    each.set_aspect("equal")
    _label(each, palette, DIVERGENCES[name].title)
  return figures.png(figure, _DPI)


# Tables

PICTURES = {  # file -> title, divergence of the whole law, loss on pairs
  "dmpo": ("DMPO", "rkl", "dmpo, soft labels"),
  "dpo": ("DPO", "fkl", "dpo"),
  "jeffreys": ("Jeffreys", "jeffreys", "jeffreys"),
  "js": ("JS", "js", "js"),
  "alpha": ("alpha 0.5", "alpha", "alpha"),
  "ipo": ("IPO", None, "ipo"),
}
PICTURES_2D = ("rkl", "fkl", "jeffreys", "js")


def follow(objective: Callable, curvature: float = 1.0) -> dict:
  """The optimum of an objective, the paths from `STARTS`, and the surface they run on."""
  return {
    "best": minimise(objective),
    "paths": [descend(objective, start, curvature=curvature) for start in STARTS],
    "surface": landscape(objective),
  }


def _fit(fit) -> str:
  return f"{fit[0]:.2f}, {fit[1]:.2f}"


def _table(head, rows) -> None:
  print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
  print("\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows) + "\n", flush=True)


def print_exact() -> dict[str, dict]:
  found, rows = {}, []
  for name, divergence in DIVERGENCES.items():
    objective = exact_objective(name)
    found[name] = follow(objective, divergence.curvature)
    ends = [_fit(path[-1]) for path in found[name]["paths"]]
    if divergence.weight is None:
      ends = ["not smooth"] * 2
    rows.append((divergence.title, divergence.formula, _fit(found[name]["best"]), *ends))
  starts = [f"descent from {_fit(start)}" for start in STARTS]
  _table(("divergence", "weight of a sample", "optimum: mean, sd", *starts), rows)
  return found


def print_pairs() -> dict[str, dict]:
  found, rows = {}, []
  for name, (loss, labels) in pair_losses().items():
    curvature = DIVERGENCES[name].curvature if name in DIVERGENCES else 1.0
    found[name] = follow(pair_objective(loss, labels), curvature)
    ends = [_fit(path[-1]) for path in found[name]["paths"]]
    rows.append((name.split(",")[0], labels, _fit(found[name]["best"]), *ends))
  starts = [f"descent from {_fit(start)}" for start in STARTS]
  _table(("loss", "labels", "optimum: mean, sd", *starts), rows)
  return found


def print_references() -> None:
  found = pair_losses()
  rows = [
    (
      f"N({reference[0]:g}, {reference[1]:g})",
      *(
        _fit(minimise(pair_objective(*found[name], reference), points=15, levels=16))
        for name in ("dmpo, soft labels", "dpo")
      ),
    )
    for reference in REFERENCES
  ]
  _table(("pairs drawn from", "dmpo: mean, sd", "dpo"), rows)


def print_samples(draws: int) -> None:
  rows = []
  for count in (2, 4, 8, 64, 1024):
    fits = [
      minimise(sampled_objective(name, count, draws), points=15, levels=16)
      for name in ("rkl", "js", "fkl")
    ]
    rows.append((count, *map(_fit, fits)))
  _table(("samples K", "reverse KL: mean, sd", "Jensen-Shannon", "forward KL"), rows)


def print_directions(draws: int) -> None:
  found = rl_directions(draws=draws)
  norm = np.linalg.norm(found.rl)
  print(f"largest |grad KL(p_hat, p_hat*) + grad J|: {np.abs(found.reverse - found.rl).max():.1e}")
  print(f"norm of grad J {norm:.4f}; cosine of forward KL {cosine(found.forward, found.rl):.3f}\n")
  rows = [
    (
      count,
      f"{np.linalg.norm(reverse - found.rl) / norm:.3f}",
      f"{cosine(reverse, found.rl):.3f}",
      f"{cosine(forward, found.rl):.3f}",
    )
    for count, (reverse, forward) in found.sampled.items()
  ]
  _table(("samples K", "reverse KL: relative error", "its cosine", "forward KL's cosine"), rows)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=pathlib.Path, help="folder for the pictures; none without it")
  parser.add_argument("--draws", type=int, default=2**17, help="samples in the two sampled tables")
  arguments = parser.parse_args()
  jax.config.update("jax_enable_x64", True)
  exact, pairs = print_exact(), print_pairs()
  print_references()
  print_samples(arguments.draws // 4)
  print_directions(arguments.draws * 2)
  paths = {name: descend_2d(name) for name in PICTURES_2D}
  _table(
    ("divergence", "mean", "sd along the axes"),
    [
      (
        DIVERGENCES[name].title,
        _fit(means[-1]),
        _fit(np.linalg.norm(np.tril(factors[-1]), axis=1)),
      )
      for name, (means, factors) in paths.items()
    ],
  )
  if arguments.out is None:
    return
  arguments.out.mkdir(parents=True, exist_ok=True)
  for theme in report_style.THEMES:
    suffix = "" if theme == "light" else f"_{theme}"
    for file, (title, whole, pair) in PICTURES.items():
      picture = draw_method(title, exact.get(whole), pairs[pair], theme)
      (arguments.out / f"mode_seeking_{file}{suffix}.png").write_bytes(picture)
    (arguments.out / f"mode_seeking_2d{suffix}.png").write_bytes(draw_2d(paths, theme))


if __name__ == "__main__":
  main()
