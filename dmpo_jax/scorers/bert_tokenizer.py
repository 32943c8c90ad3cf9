"""bert-base-uncased's WordPiece as BLIP and ImageReward use it, from the published vocab.txt.

github.com/salesforce/BLIP, models/blip.py, init_tokenizer: two tokens stand behind the vocabulary,
[DEC] and [ENC]. ImageReward puts neither at the start (ImageReward/ImageReward.py, score): a text
is [CLS] ... [SEP] and padding, 35 tokens in all.
"""

import pathlib
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Bool, Int
from tokenizers import models, normalizers, pre_tokenizers, processors

from dmpo_jax import json_files

LENGTH = 35  # ImageReward/ImageReward.py, max_length
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ADDED = ("[DEC]", "[ENC]")


class Tokens(NamedTuple):
  """Ids, and which of them are not padding."""

  input_ids: Int[np.ndarray, "n L"]
  attention_mask: Bool[np.ndarray, "n L"]


class BertTokenizer:
  """Captions -> `Tokens` of `LENGTH`; warns with the count of those that had to be cut."""

  def __init__(self, tokenizer: tokenizers.Tokenizer):
    self._tokenizer = tokenizer
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(
      pad_id=tokenizer.token_to_id("[PAD]"), pad_token="[PAD]", length=LENGTH
    )

  @property
  def vocab_size(self) -> int:
    """Number of ids, [DEC] and [ENC] included."""
    return self._tokenizer.get_vocab_size()

  def __call__(self, captions: Sequence[str]) -> Tokens:
    encodings = self._tokenizer.encode_batch(list(captions))
    cut = sum(bool(encoding.overflowing) for encoding in encodings)
    if cut:
      warnings.warn(
        f"{cut} of {len(encodings)} captions are longer than {LENGTH} tokens and were truncated",
        stacklevel=2,
      )
    ids = np.array([encoding.ids for encoding in encodings], np.int32).reshape(-1, LENGTH)
    mask = np.array([encoding.attention_mask for encoding in encodings], bool)
    return Tokens(ids, mask.reshape(-1, LENGTH))


def load_tokenizer(path: pathlib.Path) -> BertTokenizer:
  """The tokenizer of a vocab.txt, one token a line.

  Raises:
    ValueError: the file is missing, too large, or no BERT vocabulary.
  """
  if not path.is_file():
    raise ValueError(f"{path}: missing; expected the vocab.txt of bert-base-uncased")
  lines = json_files.read_text(path).split("\n")
  tokens = [line.rstrip("\r") for line in lines[: -1 if lines[-1] == "" else None]]
  vocab = {token: position for position, token in enumerate(tokens)}
  absent = [token for token in SPECIAL if token not in vocab]
  if absent:
    raise ValueError(
      f"{path}: no token {', '.join(absent)}; expected bert-base-uncased's vocab.txt"
    )
  tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
  tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.add_special_tokens([*SPECIAL, *ADDED])
  tokenizer.post_processor = processors.BertProcessing(
    ("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"])
  )
  return BertTokenizer(tokenizer)
