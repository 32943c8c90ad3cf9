"""InPO on revealed emoji choice.

Paper:    InPO (arXiv 2503.18454), with each latent inverted exactly to its timestep.
Command:  as emoji_dmpo.py, with this file
Hardware: as emoji_dmpo.py; a pair costs 28 forward passes in place of 8: 3.5 times as long a step.
Expected: not measured: beta and learning rate are those of emoji_dmpo.py.
Not so:   the published code inverts 10 steps on a grid shared by all, of which the level that
          training assumes can be 99 timesteps off, and adds noise on the way:
          --config.objective.inversion=published does as it does. It starts from a model tuned on
          winners first.
"""

import emoji_dmpo


def get_config():
  config = emoji_dmpo.get_config()
  config.objective.method = "inpo"
  config.objective.alpha = None
  config.objective.labels = None
  config.objective.sft_weight = None
  config.objective.inversion = "exact"
  config.objective.inversion_steps = 10  # the published code's
  return config
