"""Diffusion-DPO, Stable Diffusion XL, Pick-a-Pic v2, all of the UNet.

Paper:      Diffusion-DPO (Wallace et al., arXiv 2311.12908).
Command:    as sd15_dmpo_pickapic.py, with this file
Hardware:   as sdxl_dmpo_pickapic.py: the step differs in a few operations on scalars.
Confirmed:  beta 5000 (paper and launcher), batch, steps, warm-up of 200, Adafactor's settings,
            clipping, caption dropout, resize and crop: the launcher.
Not so:     the learning rate: 2.048e-5 is what the launcher comes to on 16 devices, the paper
            prints 8.19e-9.
"""

import sdxl_dmpo_pickapic


def get_config():
  config = sdxl_dmpo_pickapic.get_config()
  config.objective.method = "dpo"
  config.objective.beta = 5000.0
  config.objective.alpha = None
  config.objective.label_smoothing = 0.0
  config.optim.learning_rate = 2.048e-5
  config.optim.warmup_steps = 200
  return config
