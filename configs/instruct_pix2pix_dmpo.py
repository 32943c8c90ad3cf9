"""DMPO, InstructPix2Pix, your own triples of source, preferred and dispreferred edit.

Paper:      DMPO (arXiv 2507.07510), InstructPix2Pix (Brooks et al., arXiv 2211.09800).
Command:    dmpo prepare --config configs/instruct_pix2pix_dmpo.py --data DATA \\
              --config.data.path=MY_PAIRS (each with a source image), then dmpo train with the same
Hardware:   as sd15_dmpo_pickapic.py: the UNet differs in four input channels.
Confirmed:  nothing here is from the paper, of whose edits we know no settings; beta and alpha as in
            sd15_dmpo_pickapic.py.
Not so:     batch, steps and learning rate: a quarter of that recipe, the rate scaled alike.
"""

import sd15_dmpo_pickapic


def get_config():
  config = sd15_dmpo_pickapic.get_config()
  config.base = "timbrooks/instruct-pix2pix"
  config.batch_size = 512
  config.accumulation = 8
  config.steps = 1000
  config.data.dataset = "pairs"
  config.data.validation_share = 0.05
  config.data.flip = 0.0  # an instruction may say left or right
  config.optim.learning_rate = 5.12e-6
  config.optim.warmup_steps = 100
  config.sampling.image_guidance_scale = 1.5
  return config
