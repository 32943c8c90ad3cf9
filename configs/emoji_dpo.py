"""Diffusion-DPO on revealed emoji choice.

Paper:    arXiv 2311.12908; objective of `dmpo_jax.losses.dpo_loss`.
Command:  dmpo train --config configs/emoji_dpo.py --data data --out runs/dpo
          after dmpo prepare
Hardware: as emoji_dmpo.py.
Expected: no figure yet: data, base, steps and rate are emoji_dmpo.py's, chosen for DMPO.
"""

import emoji_dmpo


def get_config():
  config = emoji_dmpo.get_config()
  config.objective.method = "dpo"
  config.objective.alpha = None
  config.objective.label_smoothing = 0.0
  return config
