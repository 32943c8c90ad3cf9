"""MaPO, without a reference, on revealed emoji choice.

Paper:    arXiv 2406.06424; objective of `dmpo_jax.other_losses.mapo_loss`,
          constants of its public code.
Command:  dmpo train --config configs/emoji_mapo.py --data data --out runs/mapo
          after dmpo prepare
Hardware: as emoji_dmpo.py, in six eighths of its UNet passes.
Expected: no figure yet: data, base, steps and rate are emoji_dmpo.py's, chosen for DMPO.
"""

import emoji_dmpo


def get_config():
  config = emoji_dmpo.get_config()
  config.objective.method = "mapo"
  config.objective.beta = None
  config.objective.alpha = None
  config.objective.labels = None
  config.objective.sft_weight = None
  config.objective.beta_mapo = 0.1
  config.objective.snr_value = 0.5
  return config
