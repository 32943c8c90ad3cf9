"""DMPO with winner-preserving loser scaling (Diffusion-SDPO) on revealed emoji choice.

Paper:    arXiv 2511.03317; `dmpo_jax.safeguards.loser_scale`, with mu of its launcher for DMPO.
Command:  dmpo train --config configs/emoji_sdpo.py --data data --out runs/sdpo
          after dmpo prepare
Hardware: as emoji_dmpo.py; the step differs in a few operations on latents.
Expected: no figure yet: data, base, steps and rate are emoji_dmpo.py's, chosen for DMPO.
"""

import emoji_dmpo


def get_config():
  config = emoji_dmpo.get_config()
  config.objective.loser_scaling = 0.9
  return config
