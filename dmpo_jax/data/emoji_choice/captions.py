"""Captioned emoji as an in-memory source: the training set of the shipped base."""

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from dmpo_jax import types
from dmpo_jax.data.emoji_choice import emoji as emoji_lib


class CaptionedEmoji:
  """Every (emoji, keyword) as one record, so that a keyword's emoji are equally frequent."""

  def __init__(self, emoji: Sequence[emoji_lib.Emoji], moments, tokenize):
    """Takes the moments [n, h, w, 2c] of the n drawings and a tokenizer (captions -> [m, L])."""
    self._moments = np.asarray(moments, np.float32)
    self.captions = [(i, word) for i, each in enumerate(emoji) for word in each.keywords]
    self._input_ids = tokenize([word for _, word in self.captions])

  def __len__(self) -> int:
    return len(self.captions)

  def __getitem__(self, index) -> types.CaptionedBatch:
    position, _ = self.captions[index]
    return types.CaptionedBatch(self._moments[position], self._input_ids[index])


def captioned_batches(
  source: CaptionedEmoji,
  *,
  seed: int,
  batch_size: int,
  caption_dropout: float,
  empty_ids: np.ndarray,
  start: int = 0,
) -> Iterator[types.CaptionedBatch]:
  """Endless batches, reshuffled every epoch, from step `start` on; some captions emptied."""

  def drop(record, generator):
    if generator.random() >= caption_dropout:
      return record
    return record._replace(input_ids=empty_ids)

  records = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
  batches = records.random_map(drop).batch(batch_size)
  return (batches[step] for step in range(start, len(batches)))


def image_batches(
  images: np.ndarray, *, seed: int, batch_size: int, start: int = 0
) -> Iterator[types.ImageBatch]:
  """Endless batches of images [n, H, W, 3], reshuffled every epoch, from step `start` on."""
  batches = grain.MapDataset.source(images).seed(seed).shuffle().repeat().batch(batch_size)
  return (types.ImageBatch(batches[step]) for step in range(start, len(batches)))
