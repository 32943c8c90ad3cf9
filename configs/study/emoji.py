"""The study: every method on revealed emoji choice, from one base, on one data set, at one cost.

Command:  python benchmarks/study.py --out runs/study
Hardware: 2 CPU cores, 6 GiB, an afternoon; it goes on where it was stopped.
Rules:    stated in `benchmarks/study.py`: settings are chosen on the validation split with the
          sweep's seed, the table is of the test split with the other seeds.
"""

import ml_collections
from ml_collections import config_dict

BETAS = tuple(f"objective.beta={beta}" for beta in (500.0, 1000.0, 2000.0, 4000.0))
# IPO's loss has its minimum at a margin of 1/2, where DMPO's with alpha 0.01 has it at 4.6.
LOW_BETAS = tuple(f"objective.beta={beta}" for beta in (100.0, 250.0, 500.0, 1000.0))


def get_config():
  config = ml_collections.ConfigDict()
  # Forward passes of the UNet that a run may spend, a backward pass counting as two: those of the
  # demo, 250 updates with 32 pairs at 8 passes. A method that needs more a pair gets fewer updates.
  config.passes = 250 * 32 * 8
  config.updates = config_dict.placeholder(int)  # in place of passes: as many for every method
  config.validation_images = 8  # a prompt
  config.test_images = 12
  config.sweep_seed = 0
  config.seeds = (1, 2, 3)
  # What a setting may cost on the validation split, against the base, and still be chosen.
  config.lost_match = 0.02
  config.grown_rmse = 1.25
  config.noise = (0.1, 0.2, 0.3)  # share of training pairs whose winner and loser are swapped
  config.noisy = ("dmpo", "dpo")
  # Name of a row -> its configuration file, and the settings that are tried.
  config.methods = ml_collections.ConfigDict(
    {
      "dmpo": ("emoji_dmpo", (*BETAS, "objective.alpha=0.1", "objective.alpha=0.001")),
      "dpo": ("emoji_dpo", BETAS),
      "fpo_js": ("emoji_fpo", tuple(f"objective.divergence=js {beta}" for beta in BETAS)),
      "fpo_alpha": (
        "emoji_fpo",
        tuple(f"objective.divergence=alpha objective.order={a}" for a in (0.1, 0.5, 0.9)),
      ),
      "ipo": ("emoji_ipo", LOW_BETAS),
      "inpo": ("emoji_inpo", BETAS),
      "seppo": ("emoji_seppo", BETAS),
      "sdpo": ("emoji_sdpo", BETAS),
      "dmpo_sft": ("emoji_dmpo_sft", BETAS),
      "kto": ("emoji_kto", BETAS),
      "mapo": ("emoji_mapo", ("objective.beta_mapo=0.1", "objective.beta_mapo=1.0")),
      "sft": ("emoji_sft", tuple(f"optim.learning_rate={rate}" for rate in (2e-5, 5e-5, 1e-4))),
    }
  )
  return config
