"""The scorers by name: what each measures, where its weights are from, and how to load it."""

import pathlib
from collections.abc import Callable, Set
from typing import NamedTuple

from dmpo_jax import hub, paths
from dmpo_jax.scorers import batches, clip_scorers, image_reward, niqe

TOKENIZER = "tokenizer.json"
MODEL = "model.safetensors"
# What may lie in a file's place.
_STANDS_IN = {
  TOKENIZER: ("merges.txt",),
  MODEL: ("model.safetensors.index.json", "model.*.safetensors"),
}
_UNWANTED = ("*.fp16.*", "*.bf16.*")
_CONVERSION = "docs/scorers.md has the command that makes it of the published {}"


class ScorerInfo(NamedTuple):
  """A row of `SCORERS`.

  Attributes:
    measures: what a higher score means, and the paper.
    repository: hub id or address of the published weights.
    licence: of the weights, as their page states it; "not stated" where we found none.
    files: names in the folder that `load_scorer` reads; empty where nothing is published and `load`
      looks itself at what the user put there.
    values: the range of its values, and what is usual.
    remedy: where missing files come from.
    load: reads the folder.
  """

  measures: str
  repository: str
  licence: str
  files: tuple[str, ...]
  values: str
  remedy: str
  load: Callable[[pathlib.Path], batches.Scorer]


def _hps(name: str, published: str) -> ScorerInfo:
  file = clip_scorers.HPS_FILES[name]
  version = name.removeprefix("hps")
  return ScorerInfo(
    measures=f"human preference, fitted to HPD {version[:2]}: HPS {version} (arXiv 2306.09341)",
    repository="xswu/HPSv2",
    licence="Apache-2.0",
    files=(file, TOKENIZER),
    values="cosine x 100, [-100, 100]; 23 to 34 in published tables",
    remedy=f"{_CONVERSION.format(published)}; the tokenizer is that of "
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    load=lambda folder: clip_scorers.load_hps(folder / file),
  )


SCORERS = {
  "pickscore": ScorerInfo(
    measures="human preference, fitted to Pick-a-Pic: PickScore (arXiv 2305.01569)",
    repository="yuvalkirstain/PickScore_v1",
    licence="not stated",
    files=("config.json", MODEL, TOKENIZER),
    values="cosine x exp(logit_scale), about 100; 20 to 24 in published tables",
    remedy="hf download yuvalkirstain/PickScore_v1 --local-dir FOLDER",
    load=clip_scorers.load_pickscore,
  ),
  "hpsv2": _hps("hpsv2", "HPS_v2_compressed.pt"),
  "hpsv2.1": _hps("hpsv2.1", "HPS_v2.1_compressed.pt"),
  "aesthetic": ScorerInfo(
    measures="looks without the caption, fitted to ratings: LAION's aesthetic predictor V2",
    repository="github.com/christophschuhmann/improved-aesthetic-predictor",
    licence="not stated; CLIP ViT-L/14: MIT",
    files=("config.json", MODEL, clip_scorers.AESTHETIC_FILE),
    values="a rating of 1 to 10, unbounded; 5 to 6.5 in published tables",
    remedy="hf download openai/clip-vit-large-patch14 --local-dir FOLDER; "
    + _CONVERSION.format("sac+logos+ava1-l14-linearMSE.pth"),
    load=clip_scorers.load_aesthetic,
  ),
  "clip_score": ScorerInfo(
    measures="fit of image and caption, by any CLIP (arXiv 2104.08718, without its cut at 0)",
    repository="laion/CLIP-ViT-H-14-laion2B-s32B-b79K, openai/clip-vit-large-patch14, ...",
    licence="MIT (both)",
    files=("config.json", MODEL, TOKENIZER),
    values="cosine x 100, [-100, 100]",
    remedy="hf download openai/clip-vit-large-patch14 --local-dir FOLDER",
    load=clip_scorers.load_clip_score,
  ),
  "imagereward": ScorerInfo(
    measures="human preference, fitted to ranked images: ImageReward-v1.0 (arXiv 2304.05977)",
    repository="THUDM/ImageReward",
    licence="Apache-2.0",
    files=(image_reward.FILE, "vocab.txt"),
    values="unbounded, mean 0 and deviation 1 over its training set",
    remedy=_CONVERSION.format("ImageReward.pt")
    + "; vocab.txt is that of google-bert/bert-base-uncased",
    load=image_reward.load_image_reward,
  ),
  "niqe": ScorerInfo(
    measures="naturalness without the caption: minus NIQE's distance from pictures of your choice "
    "(Mittal et al., IEEE SPL 2013)",
    repository="none: statistics of the pictures in the folder take the place of weights",
    licence="that of these pictures",
    files=(),
    values="0 and below; comparable for one set of reference pictures alone",
    remedy="put PNG, JPEG or WebP pictures that you call good in it, or niqe.safetensors as "
    "niqe.save writes it",
    load=niqe.load_niqe,
  ),
}


def load_scorer(name: str, path: str | pathlib.Path) -> batches.Scorer:
  """Reads a scorer's weights, float32, and places them on the devices of this process.

  Args:
    name: a key of `SCORERS`.
    path: a folder that holds the `files` of `SCORERS[name]`; for hpsv2 and hpsv2.1 also the weight
      file itself; or a hub id that has these files, where there are any.

  Returns:
    (uint8 RGB images [n, H, W, 3], n captions) -> float32 [n], one score for each image with its
    own caption.

  Raises:
    ValueError: there is no such scorer or path, files are missing, or they are of another model.
  """
  folder = _checked_folder(name, path)
  return SCORERS[name].load(folder)


def check_scorer(name: str, path: str | pathlib.Path) -> None:
  """Refuses what `load_scorer` would, as far as it shows without reading weights.

  Raises:
    ValueError: as `load_scorer`.
  """
  folder = _checked_folder(name, path)
  if not SCORERS[name].files:  # then what lies there is small, and no name tells whether it will do
    SCORERS[name].load(folder)


def _checked_folder(name: str, path: str | pathlib.Path) -> pathlib.Path:
  if name not in SCORERS:
    raise ValueError(f"scorer {name!r} is not known; expected one of {', '.join(SCORERS)}")
  info = SCORERS[name]
  folder = _folder(name, path)
  missing = [file for file in info.files if not _is_there(folder, file)]
  if missing:
    others = _about_other_version(name, {each.name for each in folder.iterdir()})
    raise ValueError(
      f"scorer {name}: {folder} has no {' and no '.join(missing)}{others}; expected "
      f"{', '.join(info.files)}: {info.remedy}"
    )
  return folder


def _folder(name, path):
  folder = pathlib.Path(path)
  info = SCORERS[name]
  if folder.is_file():
    if name not in clip_scorers.HPS_FILES or folder.name != info.files[0]:
      raise ValueError(
        f"scorer {name}: {folder} is a file; expected {_wanted(info)}"
        f"{_about_other_version(name, {folder.name})}: {info.remedy}"
      )
    folder = folder.parent
  elif info.files and not folder.exists() and hub.is_repository(str(path)):
    stand_ins = (each for file in info.files for each in _STANDS_IN.get(file, ()))
    wanted = (*info.files, *stand_ins, "model-*.safetensors", "vocab.json", "*_config.json")
    folder = hub.download(
      str(path), (*wanted, "special_tokens_map.json"), _UNWANTED, what=f"scorer {name}"
    )
  if not folder.is_dir():
    or_hub = ", or a hub id (owner/name)" if info.files else ""
    raise ValueError(
      f"scorer {name}: {folder} does not exist; expected {_wanted(info)}{or_hub}: {info.remedy}"
    )
  paths.check_links(folder)
  return folder


def _wanted(info: ScorerInfo) -> str:
  if not info.files:
    return "a folder"
  return f"a folder with {', '.join(info.files)}, each under its own name"


def _is_there(folder: pathlib.Path, file: str) -> bool:
  patterns = _STANDS_IN.get(file, ())
  return (folder / file).is_file() or any(any(folder.glob(each)) for each in patterns)


def _about_other_version(name: str, files: Set[str]) -> str:
  """Their scores of the same images differ by 1 to 3 points, by more than methods do."""
  for other, file in clip_scorers.HPS_FILES.items():
    if name in clip_scorers.HPS_FILES and other != name and file in files:
      return f" ({file} is {other}, whose scores are not comparable: ask for it by that name)"
  return ""
