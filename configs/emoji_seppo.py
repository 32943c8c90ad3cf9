"""SePPO on revealed emoji choice: winners alone, against the policy's own past.

Paper:    SePPO (arXiv 2410.05255).
Command:  as emoji_dmpo.py, with this file; one process, on any number of its devices
Hardware: as emoji_dmpo.py. A step costs what DMPO's does; each of the 9 rounds first draws up to
          960 pictures of 25 steps with guidance.
Expected: not measured: beta and learning rate are those of emoji_dmpo.py.
Not so:   the paper's beta, learning rate and sampler are not known to us; a checkpoint every 30
          updates and 7 of them are its own.
"""

import emoji_dmpo


def get_config():
  config = emoji_dmpo.get_config()
  config.objective.method = "seppo"
  config.objective.alpha = None
  config.objective.labels = None
  config.objective.sft_weight = None
  config.objective.reference_every = 30
  config.objective.reference_keep = 7
  return config
