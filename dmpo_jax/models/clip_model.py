"""Both encoders of CLIP and the space they share (Radford et al., arXiv 2103.00020).

The parameters are one tree under the names of transformers' CLIPModel: `clip.CLIPTextModel`,
`clip_vision.CLIPVisionModelWithProjection` and `logit_scale`, side by side.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dmpo_jax.models import clip, clip_vision, fields, init


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
  """Configurations of the two encoders; both project to `projection_dim` features."""

  text: clip.CLIPTextConfig
  vision: clip_vision.CLIPVisionConfig

  def __post_init__(self):
    if self.text.projection_dim != self.vision.projection_dim:
      raise ValueError(
        f"projection_dim: {self.text.projection_dim} of texts and {self.vision.projection_dim} of "
        "images; expected one number"
      )


# transformers' defaults (configuration_clip.py), for the fields that a file leaves out.
TEXT_DEFAULTS = {
  "vocab_size": 49408,
  "hidden_size": 512,
  "intermediate_size": 2048,
  "num_hidden_layers": 12,
  "num_attention_heads": 8,
  "max_position_embeddings": 77,
}
VISION_DEFAULTS = {
  "hidden_size": 768,
  "intermediate_size": 3072,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "image_size": 224,
  "patch_size": 32,
}
PROJECTION_DEFAULT = 512
# Fields that transformers 4 writes into every part of a configuration: of generating text, of
# heads that CLIP has not, and of what is returned.
WITHOUT_EFFECT = (
  *clip.WITHOUT_EFFECT,
  *(
    "add_cross_attention bad_words_ids begin_suppress_tokens chunk_size_feed_forward "
    "cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample early_stopping "
    "encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task "
    "forced_bos_token_id forced_eos_token_id id2label is_decoder is_encoder_decoder label2id "
    "length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams "
    "num_return_sequences output_attentions output_hidden_states output_scores prefix problem_type "
    "remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id "
    "suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder "
    "tie_word_embeddings tokenizer_class top_k top_p torchscript typical_p use_bfloat16"
  ).split(),
)
NEUTRAL = clip.NEUTRAL | {"architectures": (None,), "pruned_heads": ({},)}


def read_config(raw: Mapping[str, Any], where: str = "config.json") -> CLIPConfig:
  """Reads transformers' JSON of a CLIPModel; refuses by name what is set and not implemented.

  Raises:
    ValueError: it is the configuration of another model, or a field is not known.
  """
  if raw.get("model_type", "clip") != "clip":
    raise ValueError(f"{where}: model_type is {raw['model_type']!r}; expected 'clip'")
  projection = raw.get("projection_dim", PROJECTION_DEFAULT)

  def read(cls, name, defaults):
    section = _section(raw, name, defaults, where) | {"projection_dim": projection}
    return fields.read_fields(cls, section, NEUTRAL, where=f"{where}, {name}")

  return CLIPConfig(
    read(clip.CLIPTextConfig, "text_config", TEXT_DEFAULTS),
    read(clip_vision.CLIPVisionConfig, "vision_config", VISION_DEFAULTS),
  )


def _section(raw, name, defaults, where):
  # The older `*_config_dict`, where there is one, stands for the whole, as in transformers.
  section = raw.get(f"{name}_dict") or raw.get(name) or {}
  if not isinstance(section, Mapping):
    raise ValueError(f"{where}: {name} is {type(section).__name__}; expected an object")
  return defaults | {key: value for key, value in section.items() if key not in WITHOUT_EFFECT}


def param_shapes(config: CLIPConfig) -> dict[str, Any]:
  """The tree that `text_features` and `image_features` read, as `init.param_shapes` gives it."""
  vision = config.vision
  pixels = (1, vision.image_size, vision.image_size, vision.num_channels)
  texts = init.param_shapes(clip.CLIPTextModel(config.text), np.zeros((1, 1), np.int32))
  images = init.param_shapes(
    clip_vision.CLIPVisionModelWithProjection(vision), jax.ShapeDtypeStruct(pixels, jnp.float32)
  )
  return {**texts, **images, "logit_scale": jax.ShapeDtypeStruct((), jnp.float32)}


def text_features(
  config: CLIPConfig, params: Mapping[str, Any], input_ids: Int[Array, "B L"]
) -> Float[Array, "B P"]:
  """Embeddings of texts, of length 1."""
  return unit(clip.CLIPTextModel(config.text).apply({"params": params}, input_ids).text_embeds)


def image_features(
  config: CLIPConfig, params: Mapping[str, Any], pixel_values: Float[Array, "B H W C"]
) -> Float[Array, "B P"]:
  """Embeddings of normalised images, of length 1."""
  model = clip_vision.CLIPVisionModelWithProjection(config.vision)
  return unit(model.apply({"params": params}, pixel_values).image_embeds)


def unit(x: Float[Array, "B P"]) -> Float[Array, "B P"]:
  """Rows divided by their Euclidean length.

  >>> (10 * unit(jnp.array([[3.0, 4.0]]))).tolist()
  [[6.0, 8.0]]
  """
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
