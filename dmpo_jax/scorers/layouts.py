"""Tensor names of published scorers -> those of our models; whole tensors are read when looked up.

| published as           | the scorers             | becomes the layout of       |
|------------------------|-------------------------|-----------------------------|
| OpenCLIP's state dict  | HPS v2, HPS v2.1        | transformers' CLIPModel     |
| ImageReward.pt         | ImageReward             | `models.blip.ImageReward`   |
| transformers CLIPModel | PickScore, CLIP, LAION  | itself                      |
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from dmpo_jax.safetensors_io import Tensor, Tensors, as_tensors

QKV = ("q_proj", "k_proj", "v_proj")


class Rule(NamedTuple):
  """Names that match `pattern` to the end become `names`, one or more parts of the tensor.

  Attributes:
    names: templates as in `re.sub`; none drops the tensor; several share its rows equally.
    change: of the shape and the value.
  """

  pattern: str
  names: tuple[str, ...]
  change: Callable[[np.ndarray], np.ndarray] = lambda value: value


def _layers(theirs: str, ours: str, modules: Mapping[str, str], fused: str) -> list[Rule]:
  """Rules of a stack of transformer layers whose query, key and value are one matrix."""
  rules = [
    Rule(rf"{theirs}\.(\d+)\.{re.escape(module)}\.(weight|bias)", (rf"{ours}.\1.{name}.\2",))
    for module, name in modules.items()
  ]
  split = tuple(rf"{ours}.\1.self_attn.{each}.\2" for each in QKV)
  return [*rules, Rule(rf"{theirs}\.(\d+)\.{fused}(weight|bias)", split)]


_OPEN_CLIP_LAYER = {
  "ln_1": "layer_norm1",
  "ln_2": "layer_norm2",
  "mlp.c_fc": "mlp.fc1",
  "mlp.c_proj": "mlp.fc2",
  "attn.out_proj": "self_attn.out_proj",
}
_BLIP_LAYER = {
  "norm1": "layer_norm1",
  "norm2": "layer_norm2",
  "mlp.fc1": "mlp.fc1",
  "mlp.fc2": "mlp.fc2",
  "attn.proj": "self_attn.out_proj",
}
_VISION = "vision_model.embeddings"


def _flat(value):
  return value.reshape(-1)


def _without_first(value):
  return value.reshape(value.shape[1:])


# OpenCLIP's names: github.com/mlfoundations/open_clip, src/open_clip/model.py and transformer.py.
OPEN_CLIP = (
  Rule(r"logit_scale", ("logit_scale",)),
  Rule(r"(visual\.)?attn_mask", ()),  # a buffer, the causal mask
  Rule(r"visual\.class_embedding", (f"{_VISION}.class_embedding",)),
  Rule(r"visual\.positional_embedding", (f"{_VISION}.position_embedding.weight",)),
  Rule(r"visual\.conv1\.weight", (f"{_VISION}.patch_embedding.weight",)),
  Rule(r"visual\.ln_pre\.(.*)", (r"vision_model.pre_layrnorm.\1",)),
  Rule(r"visual\.ln_post\.(.*)", (r"vision_model.post_layernorm.\1",)),
  # Projections are matrices that stand right of the features, not layers.
  Rule(r"visual\.proj", ("visual_projection.weight",), np.transpose),
  Rule(r"text_projection", ("text_projection.weight",), np.transpose),
  Rule(r"token_embedding\.weight", ("text_model.embeddings.token_embedding.weight",)),
  Rule(r"positional_embedding", ("text_model.embeddings.position_embedding.weight",)),
  Rule(r"ln_final\.(.*)", (r"text_model.final_layer_norm.\1",)),
  *_layers(
    r"visual\.transformer\.resblocks",
    "vision_model.encoder.layers",
    _OPEN_CLIP_LAYER,
    r"attn\.in_proj_",
  ),
  *_layers(
    r"transformer\.resblocks", "text_model.encoder.layers", _OPEN_CLIP_LAYER, r"attn\.in_proj_"
  ),
)
# ImageReward's names: github.com/THUDM/ImageReward, and BLIP's models/vit.py and models/med.py.
IMAGE_REWARD = (
  Rule(r"blip\.visual_encoder\.cls_token", (f"{_VISION}.class_embedding",), _flat),
  Rule(
    r"blip\.visual_encoder\.pos_embed", (f"{_VISION}.position_embedding.weight",), _without_first
  ),
  Rule(r"blip\.visual_encoder\.patch_embed\.proj\.(.*)", (rf"{_VISION}.patch_embedding.\1",)),
  Rule(r"blip\.visual_encoder\.norm\.(.*)", (r"vision_model.post_layernorm.\1",)),
  *_layers(
    r"blip\.visual_encoder\.blocks", "vision_model.encoder.layers", _BLIP_LAYER, r"attn\.qkv\."
  ),
  Rule(r"blip\.text_encoder\.embeddings\.position_ids", ()),  # a buffer: 0, 1, 2, ...
  Rule(r"blip\.(vision|text)_proj\..*", ()),  # of BLIP's contrastive loss, which scores nothing
  Rule(r"blip\.(text_encoder\..*)", (r"\1",)),
  Rule(r"mlp\.(.*)", (r"mlp.\1",)),
)


def translate(state_dict: Mapping[str, Any], rules: tuple[Rule, ...]) -> Tensors:
  """Renames, splits and lays out tensors by `OPEN_CLIP` or `IMAGE_REWARD`.

  Args:
    state_dict: tensor name -> array, in PyTorch's layout.

  Returns:
    The same tensors under our models' names; what no rule fits keeps its name, and is refused by
    `weights.from_diffusers` as unexpected.

  >>> fused = {"transformer.resblocks.0.attn.in_proj_bias": np.arange(6.0)}
  >>> translate(fused, OPEN_CLIP)["text_model.encoder.layers.0.self_attn.k_proj.bias"].tolist()
  [2.0, 3.0]
  """
  entries = {}
  for key, tensor in as_tensors(state_dict).entries.items():
    for rule in rules:
      if match := re.fullmatch(rule.pattern, key):
        names = [match.expand(name) for name in rule.names]
        entries |= {name: _part(tensor, rule, i) for i, name in enumerate(names)}
        break
    else:
      entries[key] = tensor
  return Tensors(entries)


def _part(tensor: Tensor, rule: Rule, i: int) -> Tensor:
  parts = len(rule.names)

  def change(value):
    rows = value.shape[0] // parts if parts > 1 else None
    return rule.change(value if rows is None else value[i * rows : (i + 1) * rows])

  # Of no memory: a view of one number in the tensor's shape.
  shape = change(np.broadcast_to(np.zeros((), np.uint8), tensor.shape)).shape
  return Tensor(shape, tensor.dtype, lambda: np.array(change(tensor.read()), order="C"))
