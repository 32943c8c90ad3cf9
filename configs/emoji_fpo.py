"""f-PO with the Jensen-Shannon divergence on revealed emoji choice.

Paper:    arXiv 2410.21662; objective of `dmpo_jax.losses.fpo_loss`, which has ten divergences.
Command:  dmpo train --config configs/emoji_fpo.py --data data --out runs/fpo
          after dmpo prepare
Hardware: as emoji_dmpo.py.
Expected: no figure yet: data, base, steps and rate are emoji_dmpo.py's, chosen for DMPO.
"""

import emoji_dmpo


def get_config():
  config = emoji_dmpo.get_config()
  config.objective.method = "fpo"
  config.objective.divergence = "js"
  return config
