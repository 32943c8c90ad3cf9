"""prompt_sets.py: files as their authors publish them, and what is refused."""

import json

import pytest

from dmpo_jax import prompt_sets

# The published file's header and two of its lines: quotes are the prompt's own, a space ends one.
PARTI = (
  "Prompt\tCategory\tChallenge\tNote\n"
  "bond\tAbstract\tBasic\tBiology-inspired concepts with multiple meanings\n"
  'A robot. The words "Fly an airplane" are written. \tOutdoor Scenes\tComplex\t\n'
)


def write(folder, name, text):
  path = folder / name
  path.write_text(text, encoding="utf-8", newline="")
  return path


@pytest.mark.parametrize(
  "name, text, expected",
  [
    ("mine.txt", "a cat\n\n  a dog  \na cat\n", ("a cat", "a dog")),
    ("dos.txt", "\ufeffa cat\r\na\u2028dog\r\n", ("a cat", "a\u2028dog")),
    ("PartiPrompts.tsv", PARTI, ("bond", 'A robot. The words "Fly an airplane" are written.')),
    ("anime.json", json.dumps(["a knight", "x"], indent=1), ("a knight", "x")),
    ("list.json", json.dumps([{"id": 1, "Prompt": "a knight"}]), ("a knight",)),
    ("pick.jsonl", '{"caption": "a cat"}\n\n"a \\ud800dog"\n', ("a cat", "a ?dog")),
  ],
)
def test_reads(tmp_path, name, text, expected):
  found = prompt_sets.read_set(write(tmp_path, name, text))
  assert found.prompts == expected
  assert found.name == name.split(".")[0]
  assert found.repeats == (1 if name == "mine.txt" else 0)


@pytest.mark.parametrize(
  "name, text, message",
  [
    ("a.txt", " \n", "holds no prompt"),
    ("a.tsv", "words\tx\ncat\t1\n", r"line 2: expected a text, or a field prompt or caption or"),
    ("a.json", '{"prompt": "cat"}', "expected a JSON list"),
    ("a.json", '["cat", 3]', "entry 2: expected a text.*got int"),
    ("a.jsonl", '"cat"\n{"caption"\n', "line 2: not valid JSON"),
    ("a.jsonl", '{"caption": 5}\n', r"line 1: .*got \['caption'\]"),
    ("a.txt", "x" * 10_001, "line 1: 10001 characters; expected at most 10000"),
  ],
)
def test_refuses(tmp_path, name, text, message):
  with pytest.raises(ValueError, match=message):
    prompt_sets.read_set(write(tmp_path, name, text))


def test_names_are_those_of_the_files(tmp_path):
  first, second = (write(tmp_path, f"a.{suffix}", '["cat"]') for suffix in ("json", "txt"))
  with pytest.raises(ValueError, match="the name 'a' is given twice"):
    prompt_sets.read_sets([first, second])
  with pytest.raises(ValueError, match="the name 'overall' is taken"):
    prompt_sets.read_sets([write(tmp_path, "overall.txt", "cat")])
  with pytest.raises(ValueError, match="is not a file"):
    prompt_sets.read_sets([tmp_path / "none.txt"])


def test_the_digest_is_of_prompts_and_order():
  def digest(*prompts):
    return prompt_sets.PromptSet("a", prompts, 0).digest

  assert len({digest("a", "b"), digest("b", "a"), digest("a"), digest('a", "b')}) == 4
