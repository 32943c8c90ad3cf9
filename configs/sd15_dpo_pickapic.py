"""Diffusion-DPO, Stable Diffusion 1.5, Pick-a-Pic v2, all of the UNet.

Paper:      Diffusion-DPO (Wallace et al., arXiv 2311.12908).
Command:    as sd15_dmpo_pickapic.py, with this file
Hardware:   as sd15_dmpo_pickapic.py: the step differs in a few operations on scalars.
Confirmed:  beta 5000, batch, steps, warm-up, optimiser, clipping, caption dropout, resize and
            crop: the paper's launcher. The paper itself prints beta 2000 for this model.
Not so:     the learning rate: 2.048e-5 is what the launcher comes to, the paper prints 2.048e-8.
            The flip is drawn once a pair; the launcher draws it twice (data.independent).
"""

import sd15_dmpo_pickapic


def get_config():
  config = sd15_dmpo_pickapic.get_config()
  config.objective.method = "dpo"
  config.objective.beta = 5000.0
  config.objective.alpha = None
  config.objective.label_smoothing = 0.0
  return config
