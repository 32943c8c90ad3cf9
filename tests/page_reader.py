"""What a page says: the reader of all tests of HTML."""

import html.parser

VOID = {"meta", "img", "source"}


class Reader(html.parser.HTMLParser):
  """Collects a page's tags, addresses and text, and holds that every tag is closed in order."""

  def __init__(self, page):
    super().__init__()
    self.tags, self.attributes, self.words, self.open = [], [], [], []
    self.feed(page)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += [(tag, *each) for each in attrs]
    if tag not in VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] != "style":
      self.words.append(data)

  @property
  def text(self):
    return " ".join("".join(self.words).split())

  def addresses(self):
    return [value for _, name, value in self.attributes if name in ("src", "srcset")]
