"""Supervised fine-tuning on the winners of revealed emoji choice.

Paper:    the baseline of all of them; `dmpo_jax.other_objectives.sft_objective`.
Command:  dmpo train --config configs/emoji_sft.py --data data --out runs/sft
          after dmpo prepare
Hardware: as emoji_dmpo.py, in three eighths of its UNet passes.
Expected: no figure yet: data, base, steps and rate are emoji_dmpo.py's, chosen for DMPO.
"""

import emoji_dmpo


def get_config():
  config = emoji_dmpo.get_config()
  config.objective.method = "sft"
  config.objective.beta = None
  config.objective.alpha = None
  config.objective.labels = None
  config.objective.sft_weight = None
  return config
