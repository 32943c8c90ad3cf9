import collections
import itertools

import numpy as np
import pytest

from dmpo_jax.data import encode, geometry, mixture, pipeline, rows

RESOLUTION = 8
EMPTY = {"input_ids": np.full(3, -1, np.int32)}


def tokenize(captions):
  return np.array([[int(caption or -1)] * 3 for caption in captions], np.int32)


def moments(batch):
  return np.repeat(batch[:, ::4, ::4], 2, axis=-1)[..., :4]


class Listed:
  """Pairs whose captions are the numbers of a range."""

  def __init__(self, name, numbers):
    self.name, self._numbers = name, numbers

  def read(self):
    for number in self._numbers:
      image = png(number)
      yield rows.Pair(str(number), image, image, 1.0, str(number), self.name)


def png(number):
  import io

  from PIL import Image

  file = io.BytesIO()
  Image.new("RGB", (RESOLUTION, RESOLUTION), (number, 0, 0)).save(file, "PNG")
  return file.getvalue()


def prepare(folder, name, train, validation=range(0), fingerprint="f", token_length=3):
  source = rows.Source(
    name,
    {"train": [Listed("a", train)], "validation": [Listed("b", validation)]},
    None,
    "",
    name,
  )
  return encode.encode_source(
    source,
    folder / name,
    encode_images=moments,
    tokenize=lambda captions: tokenize(captions)[:, :token_length],
    geometry=geometry.Geometry(RESOLUTION),
    fingerprint=fingerprint,
    batch_size=8,
  )


def take(source, count, **settings):
  batches = pipeline.preference_batches(
    source,
    **{"seed": 3, "batch_size": 8, "caption_dropout": 0.0, "empty_caption": EMPTY} | settings,
  )
  return list(itertools.islice(batches, count))


def numbers(batches):
  return [int(number) for batch in batches for number in batch.input_ids[:, 0]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("latents")
  prepare(folder, "large", range(30), range(100, 106))
  prepare(folder, "small", range(50, 60), range(110, 113))
  prepare(folder, "other length", range(5), token_length=2)
  prepare(folder, "other base", range(5), fingerprint="g")
  return folder


def test_pairs_come_in_the_proportions_of_the_weights(folder):
  encoded = mixture.open_mixture("large=3 small=1", folder, fingerprint="f")
  assert len(encoded.splits["train"]) == 40 and encoded.metadata["counts"]["train"] == 40
  assert encoded.metadata["mixture"]["small"]["weight"] == 1.0
  drawn = numbers(take(encoded.splits["train"], 10))
  assert sum(number < 50 for number in drawn) == 60
  # 60 of the large set are two of its epochs, 20 of the small one are two of its own.
  assert collections.Counter(drawn) == {n: 2 for n in [*range(30), *range(50, 60)]}
  every_fourth = [n for n in drawn if n >= 50]
  assert sorted(every_fourth[:10]) == list(range(50, 60)) != every_fourth[:10]


@pytest.mark.parametrize("start", [1, 7, 10**9])
def test_a_mixture_is_sought_and_shared_as_one_set_is(folder, start):
  train = mixture.open_mixture("large=0.7 small=0.3", folder, fingerprint="f").splits["train"]
  settings = {"start": start, "caption_dropout": 0.3}
  whole = take(train, 3, **settings)
  if start < 10:
    assert numbers(take(train, start + 3, caption_dropout=0.3)[start:]) == numbers(whole)
  shares = [take(train, 3, process_index=i, process_count=2, **settings) for i in range(2)]
  for step, batch in enumerate(whole):
    joined = numbers([shares[0][step], shares[1][step]])
    assert sorted(joined) == sorted(numbers([batch]))
  names = pipeline.record_ids(train, seed=3, batch_size=8, step=start)
  kept = [str(n) for n in numbers(take(train, 1, start=start))]
  assert [name.split()[0] for name in names] == kept


def test_validation_pairs_are_mixed_too(folder):
  encoded = mixture.open_mixture(f"large=2 '{folder / 'small'}'=1", folder, fingerprint="f")
  held = pipeline.load_split(encoded.splits["validation"])
  assert sorted(numbers([held])) == [*range(100, 106), 110, 111, 112]
  assert numbers([pipeline.load_split(encoded.splits["validation"], 3)]).count(110) == 1


@pytest.mark.parametrize(
  "text, message",
  [
    ("", "expected NAME=WEIGHT"),
    ("large", "got 'large'"),
    ("large=0", "weights > 0; got 'large=0'"),
    ("large=inf", "weights > 0; got 'large=inf'"),
    ("large=x", "got 'large=x'"),
    ("=1", "got '=1'"),
    ("large=1 large=2", "large is there twice"),
    ("'large=1", "No closing quotation"),
    ("large=1 none=1", "none: no encoded data set there"),
    ("large=1 'other length'=1", r"pairs of other length have the arrays .*'input_ids': \(2,\)"),
    ("large=1 'other base'=1", "made with another VAE or tokenizer"),
  ],
)
def test_what_cannot_be_mixed_is_named(folder, text, message):
  with pytest.raises(ValueError, match=message):
    mixture.open_mixture(text, folder, fingerprint="f")


@pytest.mark.parametrize("weights", [(), (1.0,), (1.0, 0.0), (1.0, float("nan"))])
def test_weights_are_checked(weights):
  with pytest.raises(ValueError, match="mixture: expected"):
    pipeline.Mixture(([1], [2]), weights)
