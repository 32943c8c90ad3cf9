"""The pages as their readers use them: links lead somewhere, commands parse, examples come out."""

import doctest
import functools
import importlib.util
import pathlib
import re
import shlex

import pytest

from dmpo_jax import cli

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md"]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text(page):
  return page.read_text(encoding="utf-8")


def blocks(page, language):
  return [body for name, body in BLOCK.findall(text(page)) if name == language]


def prose(page):
  """Without code, in which brackets are no links."""
  return re.sub(r"`[^`\n]*`", "", BLOCK.sub("", text(page)))


def headings(page):
  return re.findall(r"^#+ (.+)$", BLOCK.sub("", text(page)), re.MULTILINE)


def anchors(page):
  """Those on which the site's generator and code hosts agree."""
  found = set()
  for heading in headings(page):
    words = re.sub(r"[^\w\s-]", "", heading).strip().lower()
    site, host = re.sub(r"[-\s]+", "-", words), words.replace(" ", "-")
    found |= {site} & {host}
  return found


def broken_links(page):
  links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
  links += re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", prose(page))
  for link in links:
    if link.startswith("https://"):
      continue
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    inside = page.parent in target.parents  # the site holds nothing beside its pages
    if not target.exists() or not inside or (anchor and anchor not in anchors(target)):
      yield link


@every_page
def test_links_and_anchors_lead_somewhere(page):
  assert list(broken_links(page)) == []


def test_broken_links_are_seen(tmp_path):
  page = tmp_path / "page.md"
  good = "[a](https://x.org) [b](#two-words) `[c](none.md)`\n\n## Two `words`\n"
  page.write_text(f"{good}\n```\n[d](none.md)\n```\n")
  assert list(broken_links(page)) == []
  page.write_text(f'{good}\n[e](none.md) [f](#none) <img src="none.png">\n')
  assert list(broken_links(page)) == ["none.md", "#none", "none.png"]


@functools.cache
def navigation():
  specification = importlib.util.spec_from_file_location("docs_nav", DOCS / "nav.py")
  module = importlib.util.module_from_spec(specification)
  specification.loader.exec_module(module)
  return module


def names(nav):
  """The files of a nav, in order."""
  values = [value for each in nav for value in each.values()]
  return [name for value in values for name in ([value] if isinstance(value, str) else value)]


def test_every_page_is_in_the_navigation_once():
  found = names(navigation().pages(DOCS))
  assert sorted(found) == sorted(path.name for path in DOCS.glob("*.md"))
  assert found[:2] == ["index.md", "concepts.md"]


def test_a_new_page_is_found_a_place(tmp_path):
  for name in ("index", "concepts", "zebra", "watching"):
    (tmp_path / f"{name}.md").write_text("# Title\n")
  nav = navigation().pages(tmp_path)
  assert [list(each) for each in nav] == [["Home"], ["Understand"], ["Watch"], ["More"]]
  assert names(nav) == ["index.md", "concepts.md", "watching.md", "zebra.md"]


@every_page
def test_a_page_has_one_title_and_no_code_that_the_generator_would_misread(page):
  assert len(re.findall(r"^# ", BLOCK.sub("", text(page)), re.MULTILINE)) == 1
  # Fences inside list items are code to a code host, and loose words to Python-Markdown.
  assert not re.search(r"^ +```", text(page), re.MULTILINE) or page.parent == ROOT


@every_page
def test_examples_come_out_as_written(page):
  examples = "\n".join(body for body in blocks(page, "python") if ">>>" in body)
  found = doctest.DocTestParser().get_doctest(examples, {}, page.name, str(page), 0)
  assert doctest.DocTestRunner().run(found).failed == 0


def commands(page):
  """Command lines of `dmpo` in shell blocks, without what a shell takes for itself."""
  for body in blocks(page, "bash"):
    for line in body.replace("\\\n", " ").splitlines():
      if re.match(r"(\S*/bin/)?dmpo ", line):
        yield shlex.split(line, comments=True)[1:]


def fields_of(config):
  """Every field that a configuration file knows, groups with dots."""

  def flat(group, prefix=""):
    for name, value in group.items():
      yield f"{prefix}{name}"
      if isinstance(value, dict):
        yield from flat(value, f"{prefix}{name}.")

  return set(flat(cli.read_config(config, [])))


@functools.cache
def known_fields():
  return fields_of(cli.DEFAULT_CONFIG) | fields_of(cli.BASE_CONFIG)


@every_page
def test_command_lines_parse_and_their_settings_exist(page):
  for words in commands(page):
    overrides = [word for word in words if word.startswith("--config.")]
    arguments = [word for word in words if word not in overrides]
    if "..." in arguments:  # shortened: only the settings are said in full
      assert arguments[0] in ("prepare", "train")
      cli.read_config(cli.DEFAULT_CONFIG, overrides)
      continue
    try:
      options = cli.make_parser().parse_args(arguments)
    except SystemExit:
      pytest.fail(f"{page.name}: the parser refuses: dmpo {shlex.join(words)}")
    if hasattr(options, "config"):
      cli.read_config(options.config, overrides)
    else:
      assert not overrides


@every_page
def test_settings_in_the_text_exist(page):
  found = set(re.findall(r"--config\.([a-z0-9_]+(?:\.[a-z0-9_]+)*)", text(page)))
  assert found <= known_fields(), f"{page.name}: unknown: {found - known_fields()}"


@every_page
def test_commands_in_the_text_exist(page):
  """Spans of code that begin with `dmpo`: the command, and its flags."""
  parser = cli.make_parser()
  (choices,) = [a.choices for a in parser._actions if isinstance(a.choices, dict)]
  (subjects,) = [a.choices for a in choices["doctor"]._actions if isinstance(a.choices, dict)]
  for span in re.findall(r"`((?:\S*/bin/)?dmpo [^`\n]+)`", BLOCK.sub("", text(page))):
    words = span.split()[1:]
    known = choices[words[0]] if words[0] in choices else None
    assert known, f"{page.name}: no command {words[0]!r}"
    if words[0] == "doctor" and len(words) > 1:
      assert words[1] in subjects, f"{page.name}: no subject {words[1]!r}"
      known = subjects[words[1]]
    for flag in words[1:]:
      if flag.startswith("--") and not flag.startswith("--config."):
        assert flag.split("=")[0] in known._option_string_actions, f"{page.name}: {span}"
