"""The study's second question: does its order come of the budget, or of one learning rate?

Command:  python benchmarks/study.py --config configs/study/emoji_updates.py --out runs/updates
Hardware: 2 CPU cores, 6 GiB, about an hour with --jobs 2.
Rules:    those of `emoji.py`, but 250 updates for all, whatever they cost, and three rates each.
          beta is what `emoji.py` chose for the row, other settings are those of its file.
"""

import ml_collections

RATES = (2e-5, 5e-5, 1e-4)  # those that SFT was given in emoji.py


def _rates(beta):
  return tuple(f"objective.beta={beta} optim.learning_rate={rate}" for rate in RATES)


def get_config():
  config = ml_collections.ConfigDict()
  config.updates = 250
  config.validation_images = 8
  config.test_images = 12
  config.sweep_seed = 0
  config.seeds = (1, 2, 3)
  config.lost_match = 0.02
  config.grown_rmse = 1.25
  config.noise = ()
  config.noisy = ()
  config.methods = ml_collections.ConfigDict(
    {
      "dmpo": ("emoji_dmpo", _rates(2000.0)),
      "dpo": ("emoji_dpo", _rates(1000.0)),
      "dmpo_sft": ("emoji_dmpo_sft", _rates(500.0)),
      "kto": ("emoji_kto", _rates(500.0)),
      "sft": ("emoji_sft", tuple(f"optim.learning_rate={rate}" for rate in RATES)),
      # At one rate: 3.5 and 7 times the passes.
      "inpo": ("emoji_inpo", ("objective.beta=4000.0",)),
      "seppo": ("emoji_seppo", ("objective.beta=1000.0",)),
    }
  )
  return config
