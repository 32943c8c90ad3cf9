"""The shipped base: a miniature Stable Diffusion, trained from scratch on 160 captioned emoji.

Paper:    latent diffusion (Rombach et al., arXiv 2112.10752), sizes of our own.
Command:  dmpo base --config configs/emoji_base.py --out runs/emoji_base
Hardware: 2 CPU cores, 6 GiB; it resumes.
Expected: prompt match >= 0.90 and RMSE to the nearest real image <= 0.06 over >= 512 samples.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.emoji = 160  # the most used; all of them would be 736
  config.vocab_size = 1024
  config.seed = 0
  config.unet = dict(
    _class_name="UNet2DConditionModel",
    act_fn="silu",
    attention_head_dim=4,  # heads, as in Stable Diffusion's own config
    block_out_channels=(96, 128),
    center_input_sample=False,
    cross_attention_dim=64,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    downsample_padding=1,
    flip_sin_to_cos=True,
    freq_shift=0,
    in_channels=16,
    layers_per_block=1,
    mid_block_scale_factor=1,
    norm_eps=1e-5,
    norm_num_groups=8,
    out_channels=16,
    sample_size=4,
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
  )
  config.vae = dict(
    _class_name="AutoencoderKL",
    act_fn="silu",
    block_out_channels=(32, 64, 96, 128),
    down_block_types=("DownEncoderBlock2D",) * 4,
    in_channels=3,
    latent_channels=16,
    layers_per_block=1,
    norm_num_groups=8,
    out_channels=3,
    sample_size=32,
    scaling_factor=1.0,  # replaced by 1 / standard deviation of the latents once they are known
    up_block_types=("UpDecoderBlock2D",) * 4,
  )
  config.text_encoder = dict(
    architectures=("CLIPTextModel",),
    hidden_act="quick_gelu",
    hidden_size=64,
    intermediate_size=256,
    layer_norm_eps=1e-5,
    max_position_embeddings=77,
    model_type="clip_text_model",
    num_attention_heads=2,
    num_hidden_layers=2,
    projection_dim=64,
  )
  config.scheduler = dict(  # Stable Diffusion 1.5's noise schedule
    _class_name="DDIMScheduler",
    beta_end=0.012,
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    clip_sample=False,
    num_train_timesteps=1000,
    prediction_type="epsilon",
    set_alpha_to_one=False,
    steps_offset=1,
    timestep_spacing="leading",
    trained_betas=None,
  )
  config.autoencoder = _run("autoencoder", steps=4000, batch_size=16, rate=1.5e-3, kl_weight=4e-4)
  config.denoise = _run("denoise", steps=6000, batch_size=64, rate=1e-3, ema=0.999)
  # Which emoji it will be is decided at the noisiest levels alone (a signal-to-noise ratio of 1/50
  # tells 160 latents of 256 numbers apart), so the captions are learnt there.
  config.condition = _run("denoise", steps=2400, batch_size=64, rate=1e-3, ema=0.995, power=4.0)
  return config


def _run(method, *, steps, batch_size, rate, kl_weight=None, ema=0.0, power=1.0):
  return dict(
    base="",  # the folder that the recipe makes
    seed=0,
    steps=steps,
    batch_size=batch_size,
    accumulation=1,
    fsdp=1,
    remat="full",
    log_every=50,
    validate_every=steps,
    save_every=500,
    keep=1,
    objective=dict(
      method=method,
      beta=None,
      alpha=None,
      label_smoothing=None,
      divergence=None,
      order=None,
      kl_weight=kl_weight,
      labels=None,
      sft_weight=None,
      loser_scaling=None,
      beta_mapo=None,
      snr_value=None,
      lambda_d=None,
      lambda_u=None,
      utility=None,
      inversion=None,
      inversion_steps=None,
      reference_every=None,
      reference_keep=None,
    ),
    data=dict(
      dataset="emoji_choice/top160",
      path=None,
      mixture=None,
      validation_share=0.0,
      resize="lanczos",
      crop="center",
      flip=0.0,
      independent=False,
      prompt_embeds=False,
      reference_draws=0,
      workers=0,
      broken_limit=0.0,
      caption_dropout=0.1 if method == "denoise" else 0.0,
      timestep_power=power,
    ),
    optim=dict(
      name="adamw",
      learning_rate=rate,
      schedule="cosine",
      warmup_steps=100,
      b1=0.9,
      b2=0.99,
      eps=1e-8,
      weight_decay=0.0,
      clip_norm=1.0,
      ema_decay=ema,
    ),
    lora=dict(rank=0, alpha=None, targets=None),
    precision=dict(compute="float32", reference="float32"),
    sampling=dict(
      sampler=None,
      steps=25,
      guidance_scale=7.5,
      guidance_rescale=0.0,
      image_guidance_scale=None,
      images_per_prompt=4,
    ),
  )
