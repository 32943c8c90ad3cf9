"""DMPO, Stable Diffusion XL, Pick-a-Pic v2, all of the UNet.

Paper:      DMPO (arXiv 2507.07510).
Command:    as sd15_dmpo_pickapic.py, with this file
Hardware:   not settled. 256 TPU v5e do not hold it at the compiler's quick effort (15.80 of 15.75
            GiB for temporaries, one pair a chip at once); v5p has six times their memory. Ask
            dmpo plan.
Expected:   not known; Diffusion-DPO reports 2,560 A100-hours.
Confirmed:  batch, steps, Adafactor's settings, clipping, caption dropout, resize and crop:
            Diffusion-DPO's launcher (arXiv 2311.12908, code).
Not so:     beta 6000, alpha and the learning rate: a public implementation of DMPO as a baseline,
            not the paper. That launcher encodes with madebyollin/sdxl-vae-fp16-fix; we encode in
            float32, where the base's own VAE needs no fix.
"""

import sd15_dmpo_pickapic


def get_config():
  config = sd15_dmpo_pickapic.get_config()
  config.base = "stabilityai/stable-diffusion-xl-base-1.0"
  config.fsdp = 64
  config.objective.beta = 6000.0
  config.optim.name = "adafactor"
  config.optim.learning_rate = 2.048e-6
  config.sampling.guidance_scale = 5.0
  return config
