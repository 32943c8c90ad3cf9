"""A headless Chromium, driven by the standard library over the DevTools Protocol on a pipe.

https://chromedevtools.github.io/devtools-protocol/
"""

import contextlib
import json
import os
import shutil
import subprocess
import time

_STATE = "[document.readyState, document.body && document.body.outerHTML].join(' ')"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find():
  """The path of a browser, or None."""
  return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextlib.contextmanager
def open_page(address, profile, *, kill=False):
  """A page of a browser of its own, whose storage lies in `profile`; closed or killed then."""
  to_read, to_write = os.pipe()
  from_read, from_write = os.pipe()
  # The browser reads commands from descriptor 3 and answers on 4.
  descriptors = f"3<&{to_read} 4>&{from_write}"
  options = f"--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage {descriptors}"
  script = f'exec "$0" --remote-debugging-pipe --user-data-dir="$1" {options}'
  process = subprocess.Popen(
    ["bash", "-c", script, find(), str(profile)],
    pass_fds=(to_read, from_write),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  os.close(to_read)
  os.close(from_write)
  with open(to_write, "wb", buffering=0) as commands, open(from_read, "rb", buffering=0) as answers:
    page = Page(commands, answers)
    try:
      page.attach(address)
      yield page
      if not kill:
        page.call("Browser.close", session=False)
        process.wait(30)
    finally:
      process.kill()
      process.wait()


class Page:
  def __init__(self, commands, answers):
    self._commands, self._answers = commands, answers
    self._number, self._rest, self._session = 0, b"", None

  def attach(self, address):
    target = self.call("Target.createTarget", url=address, session=False)["targetId"]
    self._session = self.call(
      "Target.attachToTarget", targetId=target, flatten=True, session=False
    )["sessionId"]

  def call(self, method, session=True, **params):
    self._number += 1
    message = {"id": self._number, "method": method, "params": params}
    if session:
      message["sessionId"] = self._session
    self._commands.write(json.dumps(message).encode() + b"\0")
    while True:
      answer = self._next()
      if answer.get("id") == self._number:
        assert "error" not in answer, answer
        return answer["result"]

  def _next(self):
    while b"\0" not in self._rest:
      data = self._answers.read(1 << 16)
      assert data, "the browser ended"
      self._rest += data
    message, _, self._rest = self._rest.partition(b"\0")
    return json.loads(message)

  def evaluate(self, expression):
    found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
    assert "exceptionDetails" not in found, found
    return found["result"].get("value")

  def wait(self, expression, seconds=60):
    """Until the expression is true; what the page shows is told if it does not come."""
    end = time.monotonic() + seconds
    while not self.evaluate(expression):
      assert time.monotonic() < end, (expression, self.evaluate(_STATE))
      time.sleep(0.02)

  def press(self, key, **more):
    for kind in ("keyDown", "keyUp"):
      self.call("Input.dispatchKeyEvent", type=kind, key=key, **more)
