"""Our models against PyTorch's diffusers and transformers on the same random weights."""

import dataclasses
import subprocess
import sys

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_models
import transformers
from flax import linen as nn

from dmpo_jax import types, weights
from dmpo_jax.models import clip, clip_vision, fields, init, layers, unet, vae

TOLERANCE = 1e-4  # float32, see `max_difference`
SHRINK = 3e-3  # variances near 1e-5, where the epsilons of the normalisations show


def random(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def ported_unet(config, dtype=jnp.float32, shrink=1.0):
  """The torch UNet of `config`, ours, and its weights in ours."""
  judge = torch_models.shrink(torch_models.unet(config), shrink)
  ours = unet.UNet2DConditionModel(unet.read_config(dict(judge.config)), dtype)
  shapes = init.param_shapes(ours, *unet_inputs(config))
  return judge, ours, weights.from_diffusers(torch_models.state_dict(judge), shapes)


def unet_inputs(config, height=9, width=7):
  latents = random(1, 3, height, width, config.get("in_channels", 4))
  timesteps = np.array([0, 500, 999], np.int32)
  prompt_embeds = random(2, 3, 6, config["cross_attention_dim"])
  if config.get("addition_embed_type") is None:
    return latents, timesteps, prompt_embeds
  return latents, timesteps, prompt_embeds, added_conditions(config)


def added_conditions(config):
  time_ids = np.float32(
    [[1024, 1024, 0, 0, 1024, 1024], [768, 1365, 0, 170, 1024, 1024], [64, 4000, 7, 1, 512, 2048]]
  )
  width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
  return types.AddedConditions(random(7, 3, width), time_ids)


def run_judge(judge, latents, timesteps, prompt_embeds, added=None):
  """The torch UNet on NHWC arrays; the output stays a tensor with its gradient."""
  named = (
    {name: torch.from_numpy(value) for name, value in added._asdict().items()} if added else {}
  )
  return judge(
    torch_models.channels_first(latents),
    torch.from_numpy(timesteps),
    torch.from_numpy(prompt_embeds),
    added_cond_kwargs=named,
  ).sample


def max_difference(ours, judge):
  """Largest absolute difference in units of the judge's root mean square."""
  ours, judge = np.asarray(ours), np.asarray(judge)
  assert ours.shape == judge.shape
  scale = np.sqrt(np.square(judge).mean())
  difference = np.abs(ours - judge).max() / scale
  print(f"max difference {difference:.2e} of the root mean square {scale:.2f}")
  return difference


@pytest.mark.slow
@pytest.mark.parametrize(
  ("config", "height", "width"),
  [
    pytest.param(torch_models.UNET_SD1, 9, 7, id="sd1-odd"),
    pytest.param(torch_models.UNET_SD2, 11, 13, id="sd2-odd", marks=pytest.mark.slow),
    pytest.param(torch_models.UNET_OTHER, 8, 8, id="other-fields", marks=pytest.mark.slow),
    pytest.param(torch_models.UNET_TEXT_TIME, 7, 5, id="text-time", marks=pytest.mark.slow),
    pytest.param(torch_models.UNET_SD15_SMALL, 13, 9, id="sd15", marks=pytest.mark.slow),
    pytest.param(torch_models.UNET_SD21_SMALL, 11, 14, id="sd21", marks=pytest.mark.slow),
    pytest.param(torch_models.UNET_IP2P_SMALL, 12, 15, id="ip2p", marks=pytest.mark.slow),
    pytest.param(torch_models.UNET_SDXL_SMALL, 10, 7, id="sdxl", marks=pytest.mark.slow),
  ],
)
def test_unet_equals_diffusers(config, height, width):
  judge, ours, params = ported_unet(config)
  inputs = unet_inputs(config, height, width)
  with torch.no_grad():
    expected = torch_models.channels_last(run_judge(judge, *inputs))
  got = jax.jit(ours.apply)({"params": params}, *inputs)
  assert max_difference(got, expected) <= TOLERANCE


@pytest.mark.slow
def test_images_of_one_prompt_may_share_its_row():
  _, ours, params = ported_unet(torch_models.UNET_SD1)
  latents, timesteps, prompt_embeds = unet_inputs(torch_models.UNET_SD1)
  pairs = np.stack([latents, random(8, *latents.shape)], axis=1).reshape(6, *latents.shape[1:])
  inputs = jnp.asarray(pairs), jnp.asarray(timesteps.repeat(2))
  run = jax.jit(lambda prompts: ours.apply({"params": params}, *inputs, prompts))
  shared, repeated = run(prompt_embeds), run(prompt_embeds.repeat(2, axis=0))
  # Sums in another order: of keys' projections, and of what a matrix product blocks otherwise.
  assert max_difference(shared, repeated) < 1e-5
  assert max_difference(shared, run(prompt_embeds[::-1].repeat(2, axis=0))) > 0.01


@pytest.mark.parametrize(
  ("height", "width", "strides"),
  [(1, 1, 1), (2, 2, 1), (2, 7, 1), (6, 1, 1), (2, 2, 2), (1, 5, 2), (3, 3, 2)],
)
def test_convolution_of_images_below_the_kernel_equals_torch(height, width, strides):
  x, kernel = random(1, 3, height, width, 5), random(2, 3, 3, 5, 4)
  settings = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}

  def run(x, kernel):
    return layers.convolve(x, kernel, (strides, strides), ((1, 1), (1, 1)), **settings)

  out, pull_back = jax.vjp(jax.jit(run), x, kernel)
  weights_of_out = random(3, *out.shape)
  judged = [torch.from_numpy(each).double().requires_grad_() for each in (x, kernel)]
  image, weight = judged[0].permute(0, 3, 1, 2), judged[1].permute(3, 2, 0, 1)
  answer = torch.nn.functional.conv2d(image, weight, stride=strides, padding=1)
  answer = answer.permute(0, 2, 3, 1)
  answer.backward(torch.from_numpy(weights_of_out).double())
  expected = (answer.detach(), *(each.grad for each in judged))
  for got, right in zip((out, *pull_back(jnp.asarray(weights_of_out))), expected, strict=True):
    # Sums of at most 9 x 21 products of order one, in float32 here and float64 there.
    np.testing.assert_allclose(got, right.numpy(), atol=2e-5)


@pytest.mark.slow
def test_unet_normalises_small_activations_as_diffusers_does():
  judge, ours, params = ported_unet(torch_models.UNET_SD1, shrink=SHRINK)
  inputs = unet_inputs(torch_models.UNET_SD1)
  with torch.no_grad():
    expected = torch_models.channels_last(run_judge(judge, *inputs))
  got = jax.jit(ours.apply)({"params": params}, *inputs)
  assert max_difference(got, expected) <= TOLERANCE


NORM_A_BATCH = """
import jax, jax.numpy as jnp, numpy as np
from dmpo_jax.models import layers
x = np.random.default_rng(0).normal(5, 1, (4, 256, 256, 16)).astype(np.float32)
params = {"scale": jnp.linspace(0.5, 1, 16), "bias": jnp.linspace(0, 1, 16)}
got = jax.jit(layers.GroupNorm(4, 1e-6, jnp.float32).apply)({"params": params}, x)
groups = x.astype(np.float64).reshape(4, -1, 4, 4)
centred = groups - groups.mean((1, 3), keepdims=True)
normed = centred / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-6)
expected = normed.reshape(x.shape) * np.linspace(0.5, 1, 16) + np.linspace(0, 1, 16)
np.testing.assert_allclose(got, expected, atol=5e-6)
"""


@pytest.mark.slow
def test_group_norm_of_a_large_picture_equals_float64_numpy():
  # A few roundings of values up to 6; one sum over 2^18 terms errs by 7e-5 on CPU. In a process of
  # one device: among the eight of this one XLA makes no use of several cores, and sums otherwise.
  subprocess.run([sys.executable, "-c", NORM_A_BATCH], check=True)


@pytest.mark.slow
def test_unet_gradients_equal_autograd():
  judge, ours, params = ported_unet(torch_models.UNET_SD1)
  inputs = unet_inputs(torch_models.UNET_SD1)
  arrays = [jnp.asarray(each) for each in inputs]
  target = random(3, *inputs[0].shape)

  def squared_error(params):
    return jnp.square(ours.apply({"params": params}, *arrays) - target).mean()

  error, gradients = jax.jit(jax.value_and_grad(squared_error))(params)
  expected = (run_judge(judge, *inputs) - torch_models.channels_first(target)).square().mean()
  expected.backward()
  np.testing.assert_allclose(error, expected.item(), rtol=1e-5)
  gradients = dict(weights.to_diffusers(gradients))
  largest = max(parameter.grad.abs().max().item() for parameter in judge.parameters())
  for name, parameter in judge.named_parameters():
    np.testing.assert_allclose(
      gradients.pop(name), parameter.grad.numpy(), rtol=0, atol=1e-5 * largest, err_msg=name
    )
  assert not gradients


@pytest.mark.slow
def test_unet_in_bfloat16_errs_no_more_than_diffusers_in_bfloat16():
  judge, ours, params = ported_unet(torch_models.UNET_SD1, jnp.bfloat16)
  latents, timesteps, prompt_embeds = unet_inputs(torch_models.UNET_SD1)
  got = jax.jit(ours.apply)({"params": params}, latents, timesteps, prompt_embeds)
  assert got.dtype == jnp.float32  # the errors are formed in float32
  with torch.no_grad():
    exact = torch_models.channels_last(run_judge(judge, latents, timesteps, prompt_embeds))
    rounded = judge.to(torch.bfloat16)(
      torch_models.channels_first(latents).bfloat16(),
      torch.from_numpy(timesteps),
      torch.from_numpy(prompt_embeds).bfloat16(),
    ).sample.float()

  def relative_error(array):
    return np.sqrt(np.square(array - exact).mean() / np.square(exact).mean())

  error, judge_error = relative_error(got), relative_error(torch_models.channels_last(rounded))
  print(f"bfloat16: relative root mean square error {error:.4f}, diffusers {judge_error:.4f}")
  assert 1e-3 < error < 1.25 * judge_error  # not below: then nothing ran in bfloat16


TEXT_TIME = {
  "addition_embed_type": "text_time",
  "addition_time_embed_dim": 8,
  "projection_class_embeddings_input_dim": 60,
}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"class_embed_type": "timestep"}, "'class_embed_type' is 'timestep'.* expected None"),
    ({"addition_embed_type": "text"}, "addition_embed_type: 'text' is not implemented; .*'text_ti"),
    ({"addition_embed_type": "text_time"}, "addition_time_embed_dim is None; expected a width"),
    ({"addition_time_embed_dim": 8}, "addition_time_embed_dim is 8; expected None"),
    (
      {"projection_class_embeddings_input_dim": 80},
      "projection_class_embeddings_input_dim is 80; expected None, as addition_embed_type is None",
    ),
    (
      TEXT_TIME | {"projection_class_embeddings_input_dim": 48},
      "projection_class_embeddings_input_dim is 48; expected more than 6 times .* 8",
    ),
    (
      TEXT_TIME | {"addition_time_embed_dim": 8.5},
      "'addition_time_embed_dim' is 8.5; expected int",
    ),
    (TEXT_TIME | {"addition_time_embed_dim": 7}, "addition_time_embed_dim is 7; expected an even"),
    ({"dropout": 0.1}, "'dropout' is 0.1, .*; expected 0"),
    ({"resnet_time_scale_shift": "scale_shift"}, "'resnet_time_scale_shift' is 'scale_shift'"),
    ({"num_attention_heads": 8}, "'num_attention_heads' is 8"),
    ({"brand_new": 1}, "'brand_new' is not known to UNetConfig"),
    ({"down_block_types": ["AttnDownBlock2D"] * 2}, "down_block_types: 'AttnDownBlock2D'"),
    ({"up_block_types": ["UpBlock2D"]}, "up_block_types has 1 entries for 2 blocks"),
    ({"layers_per_block": [1, 2]}, r"'layers_per_block' is \(1, 2\); expected int"),
    ({"cross_attention_dim": [32, 64]}, "'cross_attention_dim' is .*; expected int"),
    ({"attention_head_dim": [4, 4, 4]}, "attention_head_dim has 3 entries for 2 blocks"),
    ({"transformer_layers_per_block": [[1], 1]}, r"'transformer_layers_per_block' is \(\[1\], 1\)"),
    ({"attention_head_dim": 5}, "attention_head_dim: 5 heads do not divide 32 channels"),
    ({"norm_num_groups": None}, "'norm_num_groups' is None; expected int"),
    ({"norm_num_groups": 7}, "32 is not divisible by norm_num_groups 7"),
  ],
)
def test_unet_config_is_refused_by_name(changes, message):
  raw = torch_models.UNET_SD1 | {"in_channels": 4, "out_channels": 4}
  with pytest.raises(ValueError, match=message):
    unet.read_config(raw | changes)


def test_missing_config_field_is_named_with_its_file():
  raw = {name: value for name, value in torch_models.UNET_SD1.items() if name != "sample_size"}
  with pytest.raises(ValueError, match="here.json: missing field.* in_channels, .*sample_size"):
    unet.read_config(raw, "here.json")


def test_inputs_of_another_width_are_refused():
  ours = unet.UNet2DConditionModel(
    unet.read_config(torch_models.UNET_SD1 | {"in_channels": 4, "out_channels": 4})
  )
  latents, timesteps, prompt_embeds = unet_inputs(torch_models.UNET_SD1)
  with pytest.raises(ValueError, match="latents: last axis is 3; expected 4, .* in_channels"):
    init.param_shapes(ours, latents[..., :3], timesteps, prompt_embeds)
  with pytest.raises(ValueError, match="prompt_embeds: last axis is 31; expected 32"):
    init.param_shapes(ours, latents, timesteps, prompt_embeds[..., :31])


def test_added_conditions_are_refused_where_they_do_not_fit():
  def shapes(config, *inputs):
    raw = {"in_channels": 4, "out_channels": 4} | config
    return init.param_shapes(unet.UNet2DConditionModel(unet.read_config(raw)), *inputs)

  *inputs, added = unet_inputs(torch_models.UNET_TEXT_TIME)
  with pytest.raises(ValueError, match="added conditions .* are missing; .*'text_time'"):
    shapes(torch_models.UNET_TEXT_TIME, *inputs)
  with pytest.raises(ValueError, match="text_embeds: last axis is 9; expected 10, .*projection_c"):
    wrong = added._replace(text_embeds=added.text_embeds[:, :9])
    shapes(torch_models.UNET_TEXT_TIME, *inputs, wrong)
  with pytest.raises(ValueError, match="time_ids: last axis is 5; expected 6"):
    shapes(torch_models.UNET_TEXT_TIME, *inputs, added._replace(time_ids=added.time_ids[:, :5]))
  with pytest.raises(ValueError, match="added conditions .* are given; expected none, .* None"):
    shapes(torch_models.UNET_SD1, *unet_inputs(torch_models.UNET_SD1), added)


def test_timestep_embedding_by_hand():
  embedding = unet.timestep_embedding(jnp.array([0, 1]), 4, flip_sin_to_cos=True, freq_shift=0)
  expected = [[1, 1, 0, 0], [np.cos(1), np.cos(0.01), np.sin(1), np.sin(0.01)]]
  np.testing.assert_allclose(embedding, expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 5, 13, 47])
def test_upsample_nearest_equals_torch(length):
  x = np.arange(2 * length * (length + 1), dtype=np.float32).reshape(2, length, length + 1, 1)
  # A UNet asks for twice the size, or one less where its input was odd.
  for size in (
    (2 * length, 2 * length + 2),
    (2 * length - 1, 2 * length + 1),
    (length + 3, 5 * length),
  ):
    expected = torch.nn.functional.interpolate(torch_models.channels_first(x), size=size)
    np.testing.assert_array_equal(
      layers.upsample_nearest(jnp.asarray(x), size), torch_models.channels_last(expected)
    )


PLAIN_VAE = torch_models.VAE | {
  "use_quant_conv": False,
  "use_post_quant_conv": False,
  "mid_block_add_attention": False,
  "layers_per_block": 1,
}


@pytest.mark.parametrize(
  ("config", "height", "width", "shrink"),
  [
    pytest.param(torch_models.VAE, 14, 18, 1.0, id="sd"),
    pytest.param(
      torch_models.VAE, 13, 15, SHRINK, id="sd-odd-small-activations", marks=pytest.mark.slow
    ),
    pytest.param(
      PLAIN_VAE, 8, 8, 1.0, id="without-quant-conv-and-attention", marks=pytest.mark.slow
    ),
    pytest.param(torch_models.VAE_SDXL_SMALL, 44, 37, 1.0, id="sdxl", marks=pytest.mark.slow),
  ],
)
def test_vae_equals_diffusers(config, height, width, shrink):
  judge = torch_models.shrink(torch_models.vae(config), shrink)
  ours = vae.AutoencoderKL(vae.read_config(dict(judge.config)))
  images = random(4, 2, height, width, 3)
  params = weights.from_diffusers(torch_models.state_dict(judge), init.param_shapes(ours, images))
  with torch.no_grad():
    posterior = judge.encode(torch_models.channels_first(images)).latent_dist
    images_expected = torch_models.channels_last(judge.decode(posterior.mean).sample)
  moments = jax.jit(lambda p, x: ours.apply({"params": p}, x, method=ours.encode))(params, images)
  mean, logvar = vae.split_moments(moments)
  assert max_difference(mean, torch_models.channels_last(posterior.mean)) <= TOLERANCE
  assert max_difference(logvar, torch_models.channels_last(posterior.logvar)) <= TOLERANCE
  decoded = jax.jit(lambda p, x: ours.apply({"params": p}, x, method=ours.decode))(params, mean)
  assert max_difference(decoded, images_expected) <= TOLERANCE


def test_vae_refuses_what_it_does_not_implement():
  raw = dict(torch_models.VAE, in_channels=3, out_channels=3)
  with pytest.raises(ValueError, match="'shift_factor' is 0.1159.* expected None"):
    vae.read_config(raw | {"shift_factor": 0.1159})
  with pytest.raises(ValueError, match="up_block_types: 'AttnUpDecoderBlock2D'"):
    vae.read_config(raw | {"up_block_types": ["AttnUpDecoderBlock2D"] * 2})
  ours = vae.AutoencoderKL(vae.read_config(raw))
  with pytest.raises(ValueError, match="images: last axis is 8; expected 3, .* in_channels"):
    init.param_shapes(ours, random(0, 1, 3, 8, 8))  # NCHW
  with pytest.raises(ValueError, match="latents: last axis is 3; expected 4"):
    init.param_shapes(ours, random(0, 1, 8, 8, 3), method=ours.decode)


@pytest.mark.slow
def test_moments_are_clipped_and_sampled_as_diffusers_does():
  moments = 40 * random(5, 2, 3, 3, 8)
  judge = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution(
    torch_models.channels_first(moments)
  )
  mean, logvar = vae.split_moments(jnp.asarray(moments))
  np.testing.assert_array_equal(mean, torch_models.channels_last(judge.mean))
  np.testing.assert_array_equal(logvar, torch_models.channels_last(judge.logvar))

  standard = np.concatenate([np.full((64, 8, 8, 4), 3.0), np.full((64, 8, 8, 4), np.log(4.0))], -1)
  latents = vae.sample_latents(jax.random.key(0), jnp.asarray(standard), 0.5)
  # 16,384 samples of N(3, 2^2), halved: the mean's standard error is 0.008.
  np.testing.assert_allclose(latents.mean(), 1.5, atol=0.04)
  np.testing.assert_allclose(latents.std(), 1.0, atol=0.03)


ONE_LAYER = torch_models.CLIP | {"num_hidden_layers": 1, "hidden_act": "gelu"}
PROJECTED = ONE_LAYER | {
  "architectures": ["CLIPTextModelWithProjection"],
  "layer_norm_eps": 1e-3,
  "projection_dim": 12,
}


@pytest.mark.parametrize(
  "config",
  [
    pytest.param(torch_models.CLIP, id="two-layers"),
    pytest.param(ONE_LAYER | {"eos_token_id": 2}, id="old-eos"),
    pytest.param(PROJECTED, id="projected"),
    pytest.param(torch_models.TEXT_L_SMALL, id="clip-l"),
    pytest.param(torch_models.TEXT_H_SMALL, id="openclip-h", marks=pytest.mark.slow),
    pytest.param(torch_models.TEXT_BIGG_SMALL, id="bigg", marks=pytest.mark.slow),
  ],
)
def test_clip_equals_transformers(config):
  judge = torch_models.clip(config)
  ours = clip.CLIPTextModel(clip.read_config(config))
  input_ids = np.random.default_rng(6).integers(3, 49, (4, 11)).astype(np.int32)
  # The end-of-text token, 49, pads as well in SD 1; 0 and 2 stand behind it in SDXL and by chance.
  input_ids[0, 4:], input_ids[1, 6:], input_ids[2, -1] = 49, (49, 0, 2, 0, 0), 49
  params = weights.from_diffusers(
    torch_models.state_dict(judge), init.param_shapes(ours, input_ids)
  )
  with torch.no_grad():
    expected = judge(torch.from_numpy(input_ids), output_hidden_states=True)
  got = jax.jit(ours.apply)({"params": params}, input_ids)
  pooled = (
    expected.text_embeds
    if config.get("architectures") == PROJECTED["architectures"]
    else (expected.pooler_output)
  )
  assert max_difference(got.last_hidden_state, expected.last_hidden_state) <= TOLERANCE
  assert max_difference(got.penultimate_hidden_state, expected.hidden_states[-2]) <= TOLERANCE
  assert max_difference(got.text_embeds, pooled) <= TOLERANCE


@pytest.mark.slow
def test_clip_of_one_layer_has_the_embeddings_as_penultimate_state():
  ours = clip.CLIPTextModel(clip.read_config(ONE_LAYER))
  input_ids = jnp.array([[48, 7, 49]])
  params = init.initial_params(ours, 0, input_ids)
  tables = params["text_model.embeddings.token_embedding"]["embedding"]
  positions = params["text_model.embeddings.position_embedding"]["embedding"]
  got = ours.apply({"params": params}, input_ids)
  np.testing.assert_allclose(
    got.penultimate_hidden_state[0], tables[[48, 7, 49]] + positions[:3], rtol=1e-6
  )
  # Without projection the pooled state is the last one, at the end of the text.
  np.testing.assert_array_equal(got.text_embeds, got.last_hidden_state[:, 2])


@pytest.mark.slow
def test_clip_in_bfloat16_returns_float32():
  ours = clip.CLIPTextModel(clip.read_config(PROJECTED), jnp.bfloat16)
  input_ids = jnp.array([[48, 7, 49]])
  params = init.initial_params(ours, 0, input_ids)
  got = ours.apply({"params": params}, input_ids)
  assert {each.dtype.name for each in got} == {"float32"}
  exact = clip.CLIPTextModel(clip.read_config(PROJECTED)).apply({"params": params}, input_ids)
  assert 1e-4 < max_difference(got.text_embeds, exact.text_embeds) < 0.1


@pytest.mark.parametrize(
  ("position", "eos_token_id", "input_ids"),
  [
    (2, 49, [48, 7, 49, 49, 49]),  # the first of many
    (1, 7, [48, 7, 49, 7, 0]),  # not the largest
    (2, 2, [48, 2, 49, 2, 49]),  # 2 means the largest
    (0, 49, [48, 7, 8, 9, 9]),  # none
  ],
)
def test_end_of_text(position, eos_token_id, input_ids):
  assert clip.end_of_text(jnp.array([input_ids]), eos_token_id).tolist() == [position]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"hidden_act": "relu"}, "hidden_act 'relu' is not implemented"),
    ({"dropout": 0.1}, "'dropout' is 0.1"),
    ({"attention_dropout": 0.1}, "'attention_dropout' is 0.1"),
    ({"num_attention_heads": 5}, "num_attention_heads: 5 heads do not divide hidden_size 32"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected 1 to 128"),
    ({"architectures": ["CLIPModel"]}, r"'architectures' is \('CLIPModel',\), which is not impl"),
    ({"architectures": ["CLIPTextModelWithProjection"]}, "missing field.* projection_dim"),
    ({"eos_token_id": [49, 2]}, r"'eos_token_id' is \(49, 2\); expected int"),
  ],
)
def test_clip_config_is_refused_by_name(changes, message):
  with pytest.raises(ValueError, match=message):
    clip.read_config(torch_models.CLIP | changes)


def test_clip_projects_as_its_architecture_says():
  assert clip.read_config(torch_models.TEXT_L_FULL).projection_dim is None
  assert clip.read_config(torch_models.TEXT_BIGG_FULL).projection_dim == 1280
  # What transformers writes of a configuration that it made itself.
  written = transformers.CLIPTextConfig(**torch_models.CLIP).to_diff_dict()
  assert clip.read_config(written) == clip.read_config(torch_models.CLIP)


def test_clip_refuses_too_many_tokens():
  ours = clip.CLIPTextModel(clip.read_config(torch_models.CLIP))
  with pytest.raises(ValueError, match="input_ids: 12 tokens; expected at most 11"):
    init.param_shapes(ours, np.zeros((1, 12), np.int32))


@pytest.mark.slow
def test_clip_vision_equals_transformers():
  config = torch_models.VISION_SMALL
  judge = torch_models.clip(config)
  ours = clip_vision.CLIPVisionModelWithProjection(clip_vision.read_config(config))
  pixel_values = random(8, 3, 23, 23, 3)
  params = weights.from_diffusers(
    torch_models.state_dict(judge), init.param_shapes(ours, pixel_values)
  )
  with torch.no_grad():
    expected = judge(torch_models.channels_first(pixel_values))
  got = jax.jit(ours.apply)({"params": params}, pixel_values)
  assert max_difference(got.last_hidden_state, expected.last_hidden_state) <= TOLERANCE
  assert max_difference(got.image_embeds, expected.image_embeds) <= TOLERANCE
  rounded = clip_vision.CLIPVisionModelWithProjection(ours.config, jnp.bfloat16)
  rounded = jax.jit(rounded.apply)({"params": params}, pixel_values)
  assert {each.dtype.name for each in rounded} == {"float32"}
  assert 1e-3 < max_difference(rounded.image_embeds, expected.image_embeds) < 0.1


def test_clip_vision_refuses_what_does_not_fit():
  raw = torch_models.VISION_SMALL
  with pytest.raises(ValueError, match="'architectures' is .*'CLIPVisionModel',"):
    clip_vision.read_config(raw | {"architectures": ["CLIPVisionModel"]})
  with pytest.raises(ValueError, match="num_attention_heads: 7 heads do not divide"):
    clip_vision.read_config(raw | {"num_attention_heads": 7})
  with pytest.raises(ValueError, match="image_size 4 is below patch_size 5"):
    clip_vision.read_config(raw | {"image_size": 4})
  ours = clip_vision.CLIPVisionModelWithProjection(clip_vision.read_config(raw))
  with pytest.raises(ValueError, match="pixel_values: 22 x 23 pixels; expected 23 x 23"):
    init.param_shapes(ours, random(0, 1, 22, 23, 3))
  with pytest.raises(ValueError, match="pixel_values: last axis is 23; expected 3, .*num_channels"):
    init.param_shapes(ours, random(0, 1, 3, 23, 23))
  params = init.initial_params(ours, 0, random(0, 1, 23, 23, 3))
  first = params["vision_model.embeddings"]["class_embedding"]
  assert 0.01 < first.std() < 0.04  # 32 samples of deviation 0.02


class Stack(nn.Module):
  """A net whose depth can be changed, to see what the seed does."""

  depth: int

  @nn.compact
  def __call__(self, x):
    x = nn.Embed(7, 64, name="table")(x)
    for i in range(self.depth):
      x = nn.Dense(256, name=f"hidden.{i}")(x)
    return nn.LayerNorm(name="norm")(nn.Dense(3, name="proj_out")(x))


def initial(depth=1, seed=0, **settings):
  return init.initial_params(Stack(depth), seed, np.zeros((1,), np.int32), **settings)


def test_initial_params_have_the_stated_distributions():
  params = initial(depth=2)
  # 256 x 256 samples: the standard error of the standard deviation is 0.28 %.
  np.testing.assert_allclose(params["hidden.1"]["kernel"].std(), 256**-0.5, rtol=0.02)
  np.testing.assert_allclose(params["table"]["embedding"].std(), 0.02, rtol=0.15)
  assert (params["norm"]["scale"] == 1).all()
  assert (params["norm"]["bias"] == 0).all() and (params["hidden.0"]["bias"] == 0).all()
  assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}


def test_initial_params_depend_on_seed_and_path_alone():
  params, deeper = initial(), initial(depth=2)
  np.testing.assert_array_equal(params["hidden.0"]["kernel"], deeper["hidden.0"]["kernel"])
  np.testing.assert_array_equal(params["proj_out"]["kernel"], deeper["proj_out"]["kernel"])
  assert (params["proj_out"]["kernel"] != initial(seed=1)["proj_out"]["kernel"]).all()
  first, second = deeper["hidden.0"]["kernel"], deeper["hidden.1"]["kernel"]
  correlation = np.corrcoef(first.ravel(), second[:64].ravel())[0, 1]
  assert abs(correlation) < 0.03  # 16,384 pairs: standard error 0.008


def test_zero_names_modules_from_the_end_of_the_path():
  params = initial(depth=2, zero=("proj_out", "hidden.0"))
  assert not params["proj_out"]["kernel"].any() and not params["hidden.0"]["kernel"].any()
  assert params["hidden.1"]["kernel"].all()
  with pytest.raises(ValueError, match="zero: no kernel of Stack is named out;"):
    initial(zero=("proj_out", "out"))


def test_initial_params_refuse_an_unknown_leaf():
  with pytest.raises(ValueError, match="negative_slope: no initialiser for 'negative_slope'"):
    init.initial_params(nn.PReLU(), 0, np.zeros((1, 2), np.float32))


def test_read_fields_turns_lists_into_tuples_and_skips_private_fields():
  @dataclasses.dataclass(frozen=True)
  class Config:
    widths: tuple[int, ...]
    depth: int = 1

  raw = {"widths": [1, 2], "_version": "0.6", "act": "silu"}
  assert fields.read_fields(Config, raw, {"act": ("silu",)}, where="x.json") == Config((1, 2))
