"""Scorers against the models of their authors' libraries, on the same random weights."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import torch_models
import transformers
from PIL import Image

from dmpo_jax import safetensors_io, weights
from dmpo_jax.data import tokenizer as tokenizer_lib
from dmpo_jax.data.emoji_choice import emoji as emoji_lib
from dmpo_jax.models import blip, clip, clip_model, clip_vision, init
from dmpo_jax.scorers import (
  batches,
  bert_tokenizer,
  clip_scorers,
  image_reward,
  latents,
  layouts,
  registry,
)
from dmpo_jax.scorers import captions as captions_lib

TOLERANCE = 1e-4  # float32, of the root mean square of the scores
EMBED = 24
CAPTIONS = [
  "a red apple",
  "",
  "The  WHITE cat; it's 3 o'clock!",
  "grinning face &amp;amp; sun",
  "🎉",
]


def images(count=5, height=41, width=52, seed=0):
  """Smooth random pictures: noise of a quarter of the size, enlarged."""
  generator = np.random.default_rng(seed)
  small = generator.integers(0, 256, (count, height // 4, width // 4, 3), np.uint8)
  large = [Image.fromarray(each).resize((width, height)) for each in small]
  return np.stack([np.asarray(each) for each in large])


def max_difference(got, expected):
  assert got.shape == expected.shape == (len(got),) and got.dtype == np.float32
  difference = np.abs(got - expected).max() / np.sqrt(np.square(expected).mean())
  print(f"max difference {difference:.2e}, scores {expected}")
  assert np.ptp(expected) > 0.01 * np.abs(expected).max()  # a constant would agree too
  return difference


def words():
  return [word for each in emoji_lib.load_emoji() for word in each.keywords]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer") / "clip"
  tokenizer_lib.train_tokenizer(words(), 600, folder)
  return folder


def make_judge(act, vocab_size=600, seed=0):
  config = transformers.CLIPConfig(
    text_config=torch_models.CLIP_TEXT_SMALL
    | {"hidden_act": act, "vocab_size": vocab_size}
    | {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1},
    vision_config=torch_models.CLIP_VISION_SMALL | {"hidden_act": act},
    projection_dim=EMBED,
  )
  judge = torch_models.randomise(transformers.CLIPModel(config), seed)
  with torch.no_grad():
    judge.logit_scale.fill_(4.5)
  return judge


@pytest.fixture(scope="module")
def clip_h(tokenizer_folder, tmp_path_factory):
  return make_folder("gelu", tokenizer_folder, tmp_path_factory.mktemp("clip_h"))


@pytest.fixture(scope="module")
def clip_l(tokenizer_folder, tmp_path_factory):
  return make_folder("quick_gelu", tokenizer_folder, tmp_path_factory.mktemp("clip_l"))


def make_folder(act, tokenizer_folder, folder):
  """A folder as transformers writes it, with its judge."""
  size = tokenizer_lib.load_tokenizer(tokenizer_folder).vocab_size
  judge = make_judge(act, size)
  judge.save_pretrained(folder)
  processor(28).save_pretrained(folder)
  for each in tokenizer_folder.iterdir():
    (folder / each.name).write_bytes(each.read_bytes())
  return folder, judge


def processor(size):
  # By name: transformers' plain CLIPImageProcessor needs torchvision.
  from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

  return CLIPImageProcessorPil(
    size={"shortest_edge": size}, crop_size={"height": size, "width": size}
  )


def judge_embeds(folder, judge, pictures, captions):
  pixels = processor(28)([Image.fromarray(each) for each in pictures], return_tensors="pt")
  tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder))
  tokens = tokenizer(captions, padding=True, truncation=True, max_length=77, return_tensors="pt")
  with torch.no_grad():
    return judge(pixel_values=pixels["pixel_values"], **tokens)


def test_pickscore_equals_transformers(clip_h):
  folder, judge = clip_h
  out = judge_embeds(folder, judge, images(), CAPTIONS)
  got = registry.load_scorer("pickscore", folder)(images(), CAPTIONS)
  assert max_difference(got, out.logits_per_image.diagonal().numpy()) <= TOLERANCE


@pytest.mark.slow
def test_clip_score_and_embeddings_equal_transformers(clip_l):
  folder, judge = clip_l
  out = judge_embeds(folder, judge, images(), CAPTIONS)
  cosines = (out.image_embeds * out.text_embeds).sum(-1).numpy()
  got = registry.load_scorer("clip_score", str(folder))(images(), CAPTIONS)
  assert max_difference(got, 100 * cosines) <= TOLERANCE
  embed = clip_scorers.load_embedder(folder)
  np.testing.assert_allclose(embed(images()), out.image_embeds.numpy(), atol=TOLERANCE)
  assert embed(images()[:0]).shape == (0, EMBED)


def test_aesthetic_score_equals_transformers_and_a_torch_head(clip_l):
  folder, judge = clip_l
  head = torch_models.randomise(torch_models.linear_head(EMBED), 1)
  state = {f"layers.{name}": value for name, value in head.state_dict().items()}
  safetensors.torch.save_file(state, folder / clip_scorers.AESTHETIC_FILE)
  pictures = images(height=40, width=46, seed=3)  # both crops are the same here
  out = judge_embeds(folder, judge, pictures, CAPTIONS)
  with torch.no_grad():
    expected = head(out.image_embeds)[:, 0].numpy()
  score = registry.load_scorer("aesthetic", folder)
  got = score(pictures, CAPTIONS)
  assert max_difference(got, expected) <= TOLERANCE
  np.testing.assert_array_equal(score(pictures, CAPTIONS[::-1]), got)  # captions are not read


OPEN_CLIP_TEXT = torch_models.CLIP_TEXT_SMALL | {"heads": 4}
OPEN_CLIP_VISION = torch_models.CLIP_VISION_SMALL | {"heads": 2}


def small_hps(vocab_size):
  settings = {"hidden_act": "gelu", "projection_dim": EMBED}
  return clip_model.CLIPConfig(
    clip.CLIPTextConfig(
      **torch_models.CLIP_TEXT_SMALL, **settings, vocab_size=vocab_size, eos_token_id=vocab_size - 1
    ),
    clip_vision.CLIPVisionConfig(**torch_models.CLIP_VISION_SMALL, **settings),
  )


def padded(picture, size):
  """OpenCLIP's ResizeMaxSize with Pillow alone."""
  height, width = picture.shape[:2]
  scale = size / max(height, width)
  small = Image.fromarray(picture).resize(
    (round(width * scale), round(height * scale)), Image.Resampling.BICUBIC
  )
  square = Image.new("RGB", (size, size))
  square.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
  return square


def normalised(pictures):
  """torchvision's ToTensor and Normalize."""
  x = np.stack([np.asarray(each) for each in pictures]).astype(np.float64) / 255
  x = (x - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
  return torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float32))


@pytest.mark.slow
def test_hps_equals_open_clip_written_out_in_torch(tokenizer_folder, tmp_path):
  tokenizer = tokenizer_lib.load_tokenizer(tokenizer_folder)
  text = OPEN_CLIP_TEXT | {"vocab_size": tokenizer.vocab_size}
  judge = torch_models.randomise(torch_models.OpenClip(text, OPEN_CLIP_VISION, EMBED), 2)
  file = tmp_path / clip_scorers.HPS_FILES["hpsv2"]
  safetensors.torch.save_file(judge.state_dict(), file)
  for each in tokenizer_folder.iterdir():
    (tmp_path / each.name).write_bytes(each.read_bytes())
  curly = CAPTIONS[:2] + ["The \u201cWHITE\u201d cat; it\u2019s"] + CAPTIONS[3:]
  ids = tokenizer(CAPTIONS[:2] + ['The "WHITE" cat; it\'s', "grinning face & sun", "🎉"])
  assert (ids != tokenizer(curly)).any(axis=1).tolist() == [False, False, True, True, False]
  pixels = normalised([padded(each, 28) for each in images()])
  with torch.no_grad():
    texts = judge.encode_text(torch.from_numpy(ids).long())
    expected = 100 * (judge.encode_image(pixels) * texts).sum(-1).numpy()
  score = clip_scorers.load_hps(file, small_hps(tokenizer.vocab_size))
  assert max_difference(score(images(), curly), expected) <= TOLERANCE


@pytest.mark.parametrize(
  ("caption", "expected"),
  [
    # What ftfy 6.3 and two readings of entities make of it.
    ("a dog\u2019s \u201cbest\u201d \u02bcday", "a dog's \"best\" 'day"),
    ("&amp;lt; &amp;amp;amp; &rsquo;", "< & '"),
    ("<b> &rsquo;", "<b> \u2019"),  # no entities in markup before quotes are straight
    ("\ufb01ne \ufb05 \uff37\uff29\u3000x \u01c5", "fine \u017ft WI x D\u017e"),
    ("a\x00\x08b\ufeff\tc", "ab\tc"),
    ("caf\u00e9 \u2014 \u2026 \U0001f389", "caf\u00e9 \u2014 \u2026 \U0001f389"),
  ],
)
def test_captions_are_cleaned_as_by_open_clip(caption, expected):
  assert captions_lib.clean(caption) == expected


def test_a_tokenizer_of_another_model_is_refused(clip_l, tmp_path):
  folder, _ = clip_l
  for each in folder.iterdir():
    (tmp_path / each.name).write_bytes(each.read_bytes())
  settings = json.loads((folder / "tokenizer_config.json").read_text())
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 78}))
  with pytest.raises(ValueError, match="gives 78 tokens; expected at most the model's 77"):
    registry.load_scorer("clip_score", tmp_path)
  small = small_hps(590)
  tensors = torch_models.OpenClip(OPEN_CLIP_TEXT | {"vocab_size": 590}, OPEN_CLIP_VISION, EMBED)
  file = tmp_path / clip_scorers.HPS_FILES["hpsv2"]
  safetensors.torch.save_file(torch_models.randomise(tensors, 0).state_dict(), file)
  with pytest.raises(ValueError, match="the tokenizer has 600 ids; expected at most the 590"):
    clip_scorers.load_hps(file, small)


SMALL_VISION = {
  "hidden_size": 32,
  "image_size": 48,
  "intermediate_size": 40,
  "num_attention_heads": 4,
  "num_hidden_layers": 2,
}
SMALL_TEXT = {
  "hidden_size": 24,
  "intermediate_size": 36,
  "num_attention_heads": 2,
  "num_hidden_layers": 2,
  "vocab_size": 60,
}


def write_vocabulary(path):
  letters = "abcdefghijklmnopqrstuvwxyz"
  tokens = [*bert_tokenizer.SPECIAL, *letters, *(f"##{each}" for each in letters)]
  tokens += ["the", "cat", "##ing", "!", "'", ";", "&", "3", "0", "中", "red", "apple", "gr", "ele"]
  path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
  return len(tokens) + 2


@pytest.mark.slow
def test_image_reward_equals_transformers_blip_and_a_torch_head(tmp_path):
  vocab_size = write_vocabulary(tmp_path / "vocab.txt")
  text = SMALL_TEXT | {"vocab_size": vocab_size}
  judge = torch_models.randomise(torch_models.ImageReward(SMALL_VISION, text), 4)
  safetensors.torch.save_file(judge.published(), tmp_path / image_reward.FILE)
  config = blip.BlipConfig(
    clip_vision.CLIPVisionConfig(
      **SMALL_VISION, projection_dim=1, patch_size=16, hidden_act="gelu", layer_norm_eps=1e-6
    ),
    blip.BlipTextConfig(**text, max_position_embeddings=512),
  )
  captions = [
    "the red apple",
    "",
    "grinning cats; élève!",
    "中 x 30 times " + "cat " * 20,
    "[ENC] the",
  ]
  tokens = bert_judge(tmp_path / "vocab.txt")(
    captions, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
  )
  pictures = images(height=60, width=73)
  # Long side 58.4, cut to 58; spare columns 10, of which 5 are left of the crop.
  cut = [
    Image.fromarray(each).resize((58, 48), Image.Resampling.BICUBIC).crop((5, 0, 53, 48))
    for each in pictures
  ]
  with torch.no_grad():
    expected = judge(normalised(cut), tokens["input_ids"], tokens["attention_mask"]).numpy()
  score = image_reward.load_image_reward(tmp_path, config)
  assert max_difference(score(pictures, captions), expected) <= TOLERANCE


def bert_judge(path):
  judge = transformers.BertTokenizer.from_pretrained(str(path.parent))
  judge.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
  return judge


def test_bert_tokens_equal_transformers(tmp_path):
  path = tmp_path / "vocab.txt"
  write_vocabulary(path)
  texts = [
    *CAPTIONS,
    *words()[:300],
    "cat " * 33,
    "cat " * 34,
    "Élève ÇA\u0301 \x00\u200b 中文 [SEP] [MASK]",
  ]
  expected = bert_judge(path)(texts, padding="max_length", truncation=True, max_length=35)
  tokenizer = bert_tokenizer.load_tokenizer(path)
  with pytest.warns(UserWarning, match="captions are longer than 35 tokens"):
    tokens = tokenizer(texts)
  np.testing.assert_array_equal(tokens.input_ids, expected["input_ids"])
  np.testing.assert_array_equal(tokens.attention_mask, np.array(expected["attention_mask"], bool))
  path.write_text("[PAD]\n[UNK]\n", encoding="utf-8")
  with pytest.raises(ValueError, match=r"vocab.txt: no token \[CLS\], \[SEP\], \[MASK\]"):
    bert_tokenizer.load_tokenizer(path)


def test_batches_of_one_size_are_compiled_once_and_change_nothing(monkeypatch):
  traced = []

  def score(params, pixel_values, lengths):
    traced.append(pixel_values.shape)
    return params * pixel_values.mean(axis=(1, 2, 3)) + lengths

  def make():
    return batches.make_scorer(
      score,
      np.float32(2),
      lambda captions: np.array([len(each) for each in captions], np.float32),
      lambda image, size: image[:size, :size],
      7,
    )

  pictures, captions = images(19), ["x" * i for i in range(19)]
  whole = make()(pictures, captions)
  monkeypatch.setattr(batches, "BATCH_PER_DEVICE", 1)
  scorer = make()
  traced.clear()
  parts = scorer(pictures, captions)
  assert traced == [(8, 7, 7, 3)]  # 19 images on 8 devices: 3 batches
  np.testing.assert_allclose(parts, whole, rtol=1e-6)
  by_hand = normalised(pictures[:, :7, :7]).double().mean((1, 2, 3)).numpy() * 2 + np.arange(19)
  np.testing.assert_allclose(parts, by_hand, rtol=1e-5)
  assert scorer(pictures[:0], []).shape == (0,)


@pytest.mark.parametrize(
  ("pictures", "captions", "message"),
  [
    (images(2), "ab", "captions: one str; expected a list"),
    (images(2), ["a"], "captions: 1 for 2 images"),
    (images(2), ["a", 3], r"captions\[1\]: int; expected str"),
    (images(2)[0], ["a"], r"images: uint8 of shape \(41, 52, 3\); expected uint8 \[n, H, W, 3\]"),
    (images(2) / 255, ["a", "b"], "images: float64 of shape"),
    (images(2)[..., :1], ["a", "b"], "images: uint8 of shape"),
  ],
)
def test_inputs_are_refused(pictures, captions, message):
  with pytest.raises(ValueError, match=message):
    batches.check_images(pictures)
    batches.check_captions(captions, len(pictures))


def test_latents_are_the_means_of_the_moments():
  def encode(params, pixels):
    small = pixels[:, ::2, ::2]
    return jnp.concatenate([params * small, jnp.full_like(small, 9)], axis=-1)

  pictures = images(3, 8, 12)
  got = latents.make_embedder(encode, np.float32(3))(pictures)
  expected = 3 * (pictures[:, ::2, ::2] / 127.5 - 1)
  np.testing.assert_allclose(got, expected.reshape(3, -1), atol=1e-5)


def test_missing_files_are_named_with_what_to_download(tmp_path):
  for name, info in registry.SCORERS.items():
    if not info.files:
      continue
    with pytest.raises(ValueError, match=f"scorer {name}: .* has no") as error:
      registry.load_scorer(name, tmp_path)
    text = str(error.value)
    assert all(file in text for file in info.files) and info.remedy in text
    (tmp_path / info.files[0]).touch()
    with pytest.raises(ValueError) as error:
      registry.load_scorer(name, tmp_path)
    assert f"no {info.files[0]} " not in str(error.value)
    (tmp_path / info.files[0]).unlink()
  with pytest.raises(
    ValueError, match="scorer 'hps' is not known; expected one of pickscore, hpsv2"
  ):
    registry.load_scorer("hps", tmp_path)
  with pytest.raises(ValueError, match="does not exist; expected a folder .* or a hub id"):
    registry.load_scorer("pickscore", tmp_path / "absent")
  # The suite is offline.
  with pytest.raises(ValueError, match="scorer pickscore 'owner/model': no such folder here"):
    registry.load_scorer("pickscore", "owner/model")


@pytest.mark.parametrize(("asked", "got"), [("hpsv2", "hpsv2.1"), ("hpsv2.1", "hpsv2")])
def test_the_versions_of_hps_are_not_mixed(tmp_path, asked, got):
  file = tmp_path / clip_scorers.HPS_FILES[got]
  file.touch()
  (tmp_path / "tokenizer.json").touch()
  for path in (tmp_path, file):
    with pytest.raises(ValueError, match=f"is {got}, whose scores are not comparable"):
      registry.load_scorer(asked, path)
  other = file.rename(tmp_path / "hps.safetensors")
  with pytest.raises(ValueError, match="is a file; expected a folder with HPS_v2"):
    registry.load_scorer(asked, other)


def test_tensors_of_another_model_are_named(tmp_path):
  judge = torch_models.OpenClip(OPEN_CLIP_TEXT | {"vocab_size": 600}, OPEN_CLIP_VISION, EMBED)
  state = torch_models.randomise(judge, 0).state_dict() | {"score_predictor.weight": torch.ones(1)}
  del state["visual.ln_post.bias"]
  file = tmp_path / "x.safetensors"
  safetensors.torch.save_file(state, file)
  with pytest.raises(ValueError, match="1 missing .*post_layernorm.bias.* 1 unexpected .*score_pr"):
    clip_scorers.load_hps(file, small_hps(600))


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("image_mean", [0.5, 0.5, 0.5], "'image_mean' is .*0.5, 0.5, 0.5.*, which is not implemented"),
    ("size", {"height": 28, "width": 28}, "field 'size' is"),
    ("resample", 2, "field 'resample' is 2, .* expected 3"),
    ("do_center_crop", False, "field 'do_center_crop' is False"),
  ],
)
def test_other_preprocessing_is_refused(clip_l, tmp_path, field, value, message):
  folder, _ = clip_l
  raw = json.loads((folder / "preprocessor_config.json").read_text())
  for name in ("config.json", "model.safetensors"):
    (tmp_path / name).write_bytes((folder / name).read_bytes())
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(raw | {field: value}))
  with pytest.raises(ValueError, match=message):
    clip_scorers.load_clip(tmp_path)


def test_configurations_of_transformers_4_are_read_and_others_refused():
  text = {"hidden_size": 768, "num_attention_heads": 12, "eos_token_id": 2, "bad_words_ids": None}
  text |= {"top_k": 50, "id2label": {"0": "LABEL_0"}, "pruned_heads": {}, "intermediate_size": 3072}
  raw = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 768}
  raw |= {"text_config": text | {"hidden_size": 12}, "text_config_dict": text}
  raw |= {"vision_config": {"patch_size": 14}, "vision_config_dict": None}
  config = clip_model.read_config(raw)
  judge = transformers.CLIPConfig(**raw)
  for ours, theirs in ((config.text, judge.text_config), (config.vision, judge.vision_config)):
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
      assert getattr(ours, name) == getattr(theirs, name)
  assert (config.text.projection_dim, config.vision.patch_size) == (768, 14)
  for changes, message in [
    ({"model_type": "siglip"}, "model_type is 'siglip'; expected 'clip'"),
    ({"vision_config": {"use_head": False}}, "vision_config: field 'use_head' is not known"),
    ({"vision_config": [1]}, "vision_config is list; expected an object"),
  ]:
    with pytest.raises(ValueError, match=message):
      clip_model.read_config(raw | changes)


def shapes_of(tree):
  return {name: each.shape for name, each in weights.to_diffusers(tree).entries.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
  ("text", "vision", "projection", "parameters"),
  [
    pytest.param(
      {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
      {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
      | {"num_hidden_layers": 24, "patch_size": 14},
      768,
      427_616_513,
      id="clip-l",
    ),
    pytest.param(
      {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
      | {"num_hidden_layers": 24, "hidden_act": "gelu"},
      {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16}
      | {"num_hidden_layers": 32, "patch_size": 14, "hidden_act": "gelu"},
      1024,
      986_109_441,
      id="clip-h",
    ),
  ],
)
def test_full_size_clip_has_transformers_tensors(text, vision, projection, parameters):
  settings = {"text_config": text, "vision_config": vision, "projection_dim": projection}
  with torch.device("meta"):
    judge = transformers.CLIPModel(transformers.CLIPConfig(**settings)).state_dict()
  config = clip_model.read_config(settings)
  shapes = clip_model.param_shapes(config)
  assert shapes_of(shapes) == {name: tuple(each.shape) for name, each in judge.items()}
  assert sum(each.size for each in jax.tree.leaves(shapes)) == parameters
  assert projection != 1024 or config == clip_scorers.VIT_H


@pytest.mark.slow
def test_full_size_hps_has_open_clips_tensors():
  text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "heads": 16}
  vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "heads": 16}
  with torch.device("meta"):
    judge = torch_models.OpenClip(
      text | {"vocab_size": 49408}, vision | {"patch_size": 14, "image_size": 224}, 1024
    )
  got = translated_shapes(judge.state_dict(), layouts.OPEN_CLIP)
  assert got == shapes_of(clip_model.param_shapes(clip_scorers.VIT_H))


@pytest.mark.slow
def test_full_size_image_reward_has_blips_tensors():
  vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
  vision |= {"num_attention_heads": 16, "image_size": 224}
  with torch.device("meta"):
    judge = torch_models.ImageReward(vision, {"num_attention_heads": 12})
  for ours, theirs in (
    (blip.IMAGE_REWARD.vision, judge.vision),
    (blip.IMAGE_REWARD.text, judge.text),
  ):
    for name in ("num_attention_heads", "hidden_act", "layer_norm_eps"):
      assert getattr(ours, name) == getattr(theirs.config, name)
  model = blip.ImageReward(blip.IMAGE_REWARD)
  shapes = init.param_shapes(model, *blip.inputs(blip.IMAGE_REWARD))
  assert translated_shapes(judge.published(), layouts.IMAGE_REWARD) == shapes_of(shapes)


def translated_shapes(state, rules):
  named = {
    name: jax.ShapeDtypeStruct(tuple(each.shape), np.float32) for name, each in state.items()
  }
  return {name: each.shape for name, each in layouts.translate(named, rules).entries.items()}


def test_the_documented_command_converts_a_pickle(tmp_path, monkeypatch):
  page = (pathlib.Path(__file__).parent.parent / "docs" / "scorers.md").read_text(encoding="utf-8")
  program = page.split('python -c "\n')[1].split('\n" HPS')[0]
  weight = torch.arange(6.0).reshape(2, 3)
  for state in ({"x": weight.T}, {"state_dict": {"x": weight.T}, "epoch": 3}):
    torch.save(state, tmp_path / "in.pt")
    files = [str(tmp_path / "in.pt"), str(tmp_path / "out.safetensors")]
    monkeypatch.setattr("sys.argv", ["-c", *files])
    exec(program, {})
    np.testing.assert_array_equal(safetensors_io.load_safetensors(files[1])["x"], weight.numpy().T)
  assert all(info.measures and f"`{name}`" in page for name, info in registry.SCORERS.items())
  assert all(each in page for info in registry.SCORERS.values() for each in info.files)
