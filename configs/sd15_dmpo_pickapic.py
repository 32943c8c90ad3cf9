"""DMPO, Stable Diffusion 1.5, Pick-a-Pic v2, all of the UNet.

Paper:      DMPO (arXiv 2507.07510).
Command:    dmpo prepare --config configs/sd15_dmpo_pickapic.py --data DATA \\
              --config.data.path=PICK_A_PIC, then dmpo train with the same --config and --data
Hardware:   16 TPU v5e (v5e:4x4), fsdp 16, 8 pairs a chip at once. On N times as many chips divide
            accumulation by N, and keep fsdp.
Expected:   6.3 hours, 101 chip-hours, at the least: dmpo plan, compiled, not run.
Confirmed:  batch, steps, optimiser, clipping, caption dropout, resize and crop: Diffusion-DPO's
            launcher (arXiv 2311.12908, code), which the paper builds on.
Not so:     beta and alpha: a public implementation of DMPO as a baseline, not the paper. The
            learning rate is that launcher's 1e-8 times the batch; Diffusion-DPO's paper prints a
            thousandth of it. The flip is drawn once a pair; the launcher draws it twice.
"""

import ml_collections
from ml_collections import config_dict


def get_config():
  config = ml_collections.ConfigDict()
  config.base = "stable-diffusion-v1-5/stable-diffusion-v1-5"
  config.seed = 0
  config.steps = 2000
  config.batch_size = 2048
  config.accumulation = 16
  config.fsdp = 16
  config.remat = "blocks"
  config.log_every = 10
  config.validate_every = 100
  config.save_every = 100
  config.keep = 2

  config.objective = ml_collections.ConfigDict()
  config.objective.method = "dmpo"
  config.objective.beta = 2000.0
  config.objective.alpha = 0.01
  config.objective.labels = "hard"
  config.objective.label_smoothing = config_dict.placeholder(float)
  config.objective.divergence = config_dict.placeholder(str)
  config.objective.order = config_dict.placeholder(float)
  config.objective.sft_weight = 0.0  # of the winner's own error beside the margin; 0: off
  config.objective.loser_scaling = config_dict.placeholder(float)  # Diffusion-SDPO's mu; None: off
  config.objective.beta_mapo = config_dict.placeholder(float)
  config.objective.snr_value = config_dict.placeholder(float)  # mapo
  config.objective.lambda_d = config_dict.placeholder(float)  # kto
  config.objective.lambda_u = config_dict.placeholder(float)  # kto
  config.objective.utility = config_dict.placeholder(str)  # kto
  config.objective.kl_weight = config_dict.placeholder(float)
  config.objective.inversion = config_dict.placeholder(str)  # inpo: exact, or published
  config.objective.inversion_steps = config_dict.placeholder(int)  # inpo
  config.objective.reference_every = config_dict.placeholder(int)  # seppo: updates a checkpoint
  config.objective.reference_keep = config_dict.placeholder(int)  # seppo: the reference is one of

  config.data = ml_collections.ConfigDict()
  config.data.dataset = "pickapic_v2"
  config.data.path = config_dict.placeholder(str)  # the folder or bucket of the parquet shards
  config.data.mixture = config_dict.placeholder(str)
  config.data.validation_share = 0.0  # the data set has a validation split
  config.data.resize = "bilinear"
  config.data.crop = "center"
  config.data.flip = 0.5
  config.data.independent = False
  config.data.prompt_embeds = False
  config.data.reference_draws = 0
  config.data.workers = 0
  config.data.broken_limit = 0.01
  config.data.timestep_power = 1.0
  config.data.caption_dropout = 0.2

  config.optim = ml_collections.ConfigDict()
  config.optim.name = "adamw"
  config.optim.learning_rate = 2.048e-5
  config.optim.schedule = "constant"
  config.optim.warmup_steps = 500
  config.optim.b1 = 0.9
  config.optim.b2 = 0.999
  config.optim.eps = 1e-8
  config.optim.weight_decay = 0.01
  config.optim.clip_norm = 1.0
  config.optim.ema_decay = 0.0

  config.lora = ml_collections.ConfigDict()
  config.lora.rank = 0
  config.lora.alpha = config_dict.placeholder(float)
  config.lora.targets = config_dict.placeholder(str)

  config.precision = ml_collections.ConfigDict()
  config.precision.compute = "bfloat16"
  config.precision.reference = "bfloat16"

  config.sampling = ml_collections.ConfigDict()
  config.sampling.sampler = config_dict.placeholder(str)
  config.sampling.steps = 50
  config.sampling.guidance_scale = 7.5
  config.sampling.guidance_rescale = 0.0
  config.sampling.image_guidance_scale = config_dict.placeholder(float)
  config.sampling.images_per_prompt = 1
  return config
