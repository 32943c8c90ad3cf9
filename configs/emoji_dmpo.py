"""DMPO on revealed emoji choice: the demo.

Paper:    DMPO (arXiv 2507.07510); objective of `dmpo_jax.losses.dmpo_loss`.
Command:  dmpo demo --out runs/demo        (or prepare, train, evaluate, export one by one)
Hardware: 2 CPU cores, 6 GiB, under 10 minutes.
Expected: held-out win rate over the reference above 0.55, prompt match and RMSE nearly unchanged.
"""

import ml_collections
from ml_collections import config_dict


def get_config():
  config = ml_collections.ConfigDict()
  config.base = "emoji"  # the shipped base, or a folder in diffusers' layout
  config.seed = 0
  config.steps = 250
  config.batch_size = 32  # pairs per update, over all devices
  config.accumulation = 1
  config.fsdp = 1  # devices that share one copy of the parameters
  config.remat = "layers"  # kept for the backward pass: outputs of layers, of blocks, or full: none
  config.log_every = 10
  config.validate_every = 25
  config.save_every = 100
  config.keep = 2

  config.objective = ml_collections.ConfigDict()
  config.objective.method = "dmpo"  # see docs/methods.md
  config.objective.beta = 1000.0  # mean-form errors: kappa = beta / 2
  config.objective.alpha = 0.01  # loser's mass in the smoothed label, (0, 0.5)
  config.objective.labels = "hard"  # or soft: no surer than the data's p_choice
  config.objective.label_smoothing = config_dict.placeholder(float)  # dpo
  config.objective.divergence = config_dict.placeholder(str)  # fpo
  config.objective.order = config_dict.placeholder(float)  # fpo with divergence "alpha"
  config.objective.sft_weight = 0.0  # of the winner's own error beside the margin; 0: off
  config.objective.loser_scaling = config_dict.placeholder(float)  # Diffusion-SDPO's mu; None: off
  config.objective.beta_mapo = config_dict.placeholder(float)
  config.objective.snr_value = config_dict.placeholder(float)  # mapo
  config.objective.lambda_d = config_dict.placeholder(float)  # kto
  config.objective.lambda_u = config_dict.placeholder(float)  # kto
  config.objective.utility = config_dict.placeholder(str)  # kto
  config.objective.kl_weight = config_dict.placeholder(float)  # autoencoder
  config.objective.inversion = config_dict.placeholder(str)  # inpo: exact, or published
  config.objective.inversion_steps = config_dict.placeholder(int)  # inpo
  config.objective.reference_every = config_dict.placeholder(int)  # seppo: updates a checkpoint
  config.objective.reference_keep = config_dict.placeholder(int)  # seppo: the reference is one of

  config.data = ml_collections.ConfigDict()
  config.data.dataset = "emoji_choice/top160"
  config.data.path = config_dict.placeholder(str)  # where other data sets lie
  config.data.mixture = config_dict.placeholder(str)  # several sets: "pickapic_v2=4 hpdv3=1"
  config.data.validation_share = 0.05  # of the captions, where a data set has no such split
  config.data.resize = "lanczos"  # or bilinear, as Diffusion-DPO has it
  config.data.crop = "center"
  config.data.flip = 0.0  # letters and arrows are among them
  config.data.independent = False  # True crops and mirrors winner and loser apart, as older code
  config.data.prompt_embeds = False  # True: prepare runs the text encoders, training does not
  config.data.reference_draws = 0  # settled draws of each pair, for dmpo cache; 0: none
  config.data.workers = 0  # processes that read ahead; 0: threads
  config.data.broken_limit = 0.01  # share of broken rows that is let pass
  # 1: uniform timesteps, as in the paper. 4 prefers the noisy ones, where alone the caption decides
  # what is drawn: with these 256-number latents that is the last seventh of the schedule.
  config.data.timestep_power = 4.0
  config.data.caption_dropout = 0.1  # trains the unconditional half of guidance too

  config.optim = ml_collections.ConfigDict()
  config.optim.name = "adamw"
  config.optim.learning_rate = 5e-5
  config.optim.schedule = "constant"
  config.optim.warmup_steps = 20
  config.optim.b1 = 0.9
  config.optim.b2 = 0.999
  config.optim.eps = 1e-8
  config.optim.weight_decay = 0.01  # Diffusion-DPO's launcher
  config.optim.clip_norm = 1.0
  config.optim.ema_decay = 0.0

  config.lora = ml_collections.ConfigDict()
  config.lora.rank = 0  # 0: all of the UNet is trained; else e.g. 16 ...
  config.lora.alpha = config_dict.placeholder(float)  # ... with alpha 16 ...
  config.lora.targets = config_dict.placeholder(str)  # ... and "to_q to_k to_v to_out.0"

  config.precision = ml_collections.ConfigDict()
  config.precision.compute = "float32"  # or bfloat16
  config.precision.reference = "float32"

  config.sampling = ml_collections.ConfigDict()
  config.sampling.sampler = config_dict.placeholder(str)  # None: the base's own
  config.sampling.steps = 25
  config.sampling.guidance_scale = 7.5  # Stable Diffusion 1.5's default
  config.sampling.guidance_rescale = 0.0
  config.sampling.image_guidance_scale = config_dict.placeholder(float)  # InstructPix2Pix
  config.sampling.images_per_prompt = 12
  return config
