"""Diffusion-KTO on winners and losers taken apart, on revealed emoji choice.

Paper:    arXiv 2404.04465; objective of `dmpo_jax.other_losses.kto_loss`,
          weights of its public code.
Command:  dmpo train --config configs/emoji_kto.py --data data --out runs/kto
          after dmpo prepare; images that were judged one by one: docs/own_pairs.md
Hardware: as emoji_dmpo.py.
Expected: no figure yet: data, base, steps and rate are emoji_dmpo.py's, chosen for DMPO.
          beta is the demo's, 1000: kappa is 500, where the public code has 1000.
"""

import emoji_dmpo


def get_config():
  config = emoji_dmpo.get_config()
  config.objective.method = "kto"
  config.objective.alpha = None
  config.objective.labels = None
  config.objective.sft_weight = None
  config.objective.lambda_d = 1.0  # desirable
  config.objective.lambda_u = 1.0  # undesirable
  config.objective.utility = "sigmoid"
  return config
