"""TFDS builder `preference_pairs`: any source as a raw TFDS data set of one schema. No TensorFlow.

`dmpo` encodes a source as it reads it and does not need this; it is for those who want the raw
pairs in TFDS.
"""

import collections
import io
import re
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow_datasets as tfds

from dmpo_jax.data import rows

_DESCRIPTION = """\
Pairs of images for one caption of which people preferred one, from the source {name}
(licence: {licence}).

image_w is the preferred image, image_l the other; p_choice is the probability that people choose
image_w, 1 for a single choice; couple names the two images in any order{edits}. Images are as they
were stored, JPEG, PNG or WebP. Ties and broken rows are left out; how many of each kind is in the
metadata.
"""
_EDITS = "; image_source is the image\nthat both are edits of"
_NO_SOURCE = "image_source is missing or is not on all rows"


class Builder(tfds.core.GeneratorBasedBuilder):
  """Writes array_record: `Builder(source, data_dir=...).download_and_prepare()`.

  Features: caption, image_w, image_l, p_choice, couple and, if the source's first pair has one,
  image_source. Splits that hold no pair are left out. The metadata hold the source's name, licence
  and fingerprint and, by split, the number of pairs and of dropped rows by reason, ties and broken
  ones apart.
  """

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "First release."}

  def __init__(self, source: rows.Source, *, file_format: str = "array_record", **kwargs):
    """Reads up to the first pair of every split.

    Raises:
      ValueError: the source holds no pair at all, judged images, or cannot be read.
    """
    firsts = {split: _first_pair(shards) for split, shards in source.splits.items()}
    self._splits = [split for split, pair in firsts.items() if pair is not None]
    if any(isinstance(pair, rows.Judged) for pair in firsts.values()):
      raise ValueError(f"{source.name}: holds images that were judged one by one; expected pairs")
    if not self._splits:
      raise ValueError(f"{source.name}: no pair in any of its splits {list(source.splits)}")
    self._edits = any(pair is not None and pair.image_source for pair in firsts.values())
    name = re.sub(r"\W+", "_", source.name)
    self._source = source  # not in the config, which is logged in full
    config = tfds.core.BuilderConfig(name=f"{name}-{source.fingerprint}")
    super().__init__(config=config, file_format=file_format, **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    source = self._source
    features = {
      "caption": tfds.features.Text(),
      "image_w": tfds.features.Image(shape=(None, None, 3)),
      "image_l": tfds.features.Image(shape=(None, None, 3)),
      "p_choice": np.float32,
      "couple": tfds.features.Text(),
    }
    if self._edits:
      features["image_source"] = tfds.features.Image(shape=(None, None, 3))
    return tfds.core.DatasetInfo(
      builder=self,
      description=_DESCRIPTION.format(
        name=source.name,
        licence=source.licence or "not stated",
        edits=_EDITS if self._edits else "",
      ),
      features=tfds.features.FeaturesDict(features),
      metadata=tfds.core.MetadataDict(
        source=source.name, licence=source.licence, fingerprint=source.fingerprint
      ),
      homepage=source.homepage,
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    del dl_manager
    return {split: self._generate_examples(split) for split in self._splits}

  def _generate_examples(self, split: str) -> Iterator[tuple[str, dict]]:
    pairs, ties, broken = 0, collections.Counter(), collections.Counter()
    for position, shard in enumerate(self._source.splits[split]):
      for number, row in enumerate(shard.read()):
        if isinstance(row, rows.Dropped):
          (broken if row.broken else ties)[row.reason] += 1
        elif self._edits != (row.image_source is not None):
          broken[_NO_SOURCE] += 1
        else:
          pairs += 1
          yield f"{position}/{number}", self._features_of(row)
    self.info.metadata[split] = {"pairs": pairs, "left_out": dict(ties), "broken": dict(broken)}

  def _features_of(self, pair: rows.Pair) -> dict:
    fields = ["image_w", "image_l"] + ["image_source"] * self._edits
    return {
      "caption": pair.caption,
      **{field: io.BytesIO(getattr(pair, field)) for field in fields},
      "p_choice": pair.p_choice,
      "couple": pair.couple,
    }


def _first_pair(shards: Sequence[rows.Shard]) -> rows.Pair | rows.Judged | None:
  found = (row for shard in shards for row in shard.read() if not isinstance(row, rows.Dropped))
  return next(found, None)
