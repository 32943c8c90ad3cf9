"""DMPO with the winner's own error beside it, on revealed emoji choice.

Paper:    `dmpo_jax.safeguards.add_sft`; derived, see there.
Command:  dmpo train --config configs/emoji_dmpo_sft.py --data data --out runs/dmpo_sft
          after dmpo prepare
Hardware: as emoji_dmpo.py.
Expected: no figure yet: data, base, steps and rate are emoji_dmpo.py's, chosen for DMPO.
"""

import emoji_dmpo


def get_config():
  config = emoji_dmpo.get_config()
  config.objective.sft_weight = 0.25  # DMPO pulls with 1.15 at the reference
  return config
