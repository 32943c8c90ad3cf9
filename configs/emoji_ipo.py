"""IPO on revealed emoji choice.

Paper:    arXiv 2310.12036; objective of `dmpo_jax.losses.ipo_loss`.
Command:  dmpo train --config configs/emoji_ipo.py --data data --out runs/ipo
          after dmpo prepare
Hardware: as emoji_dmpo.py.
Expected: no figure yet: data, base, steps and rate are emoji_dmpo.py's, chosen for DMPO.
"""

import emoji_dmpo


def get_config():
  config = emoji_dmpo.get_config()
  config.objective.method = "ipo"
  config.objective.alpha = None
  config.objective.labels = None
  return config
