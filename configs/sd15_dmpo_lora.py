"""DMPO, Stable Diffusion 1.5, your own pairs, a low-rank delta of rank 16.

Paper:      DMPO (arXiv 2507.07510); LoRA (Hu et al., arXiv 2106.09685).
Command:    dmpo prepare --config configs/sd15_dmpo_lora.py --data DATA --config.data.path=MY_PAIRS,
            then dmpo train with the same --config and --data
Hardware:   4 TPU v5e (v5e:2x2), 4 pairs a chip at once; one GPU or chip with accumulation 16.
Expected:   0.35 hours, 1.4 chip-hours, at the least: dmpo plan, compiled, not run.
Confirmed:  nothing here is from the paper, which trains the whole UNet; beta and alpha as in
            sd15_dmpo_pickapic.py.
Not so:     rank, alpha, targets, learning rate, batch and steps are what LoRA trainers of diffusers
            commonly take; tune them on your validation split.
"""

import sd15_dmpo_pickapic


def get_config():
  config = sd15_dmpo_pickapic.get_config()
  config.steps = 1000
  config.batch_size = 64
  config.accumulation = 4
  config.fsdp = 1
  config.data.dataset = "pairs"
  config.data.validation_share = 0.05
  config.data.caption_dropout = 0.1
  config.optim.learning_rate = 1e-4
  config.optim.warmup_steps = 50
  config.lora.rank = 16
  config.lora.alpha = 16.0
  config.lora.targets = "to_q to_k to_v to_out.0"
  return config
