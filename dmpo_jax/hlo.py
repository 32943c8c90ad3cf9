"""Figures of a program that the TPU compiler made: memory, FLOPs, collectives, kernels."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_COLLECTIVES = "all-gather all-reduce reduce-scatter all-to-all collective-permute".split()
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%\S+ = (.*?) ([\w-]+)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) \(.*\{\s*$")
# Products of [tokens, width] by [width, tokens] and the like in each of Pallas' attention kernels.
_KERNELS = {"flash_attention": 2, "flash_mha_bwd_dkv": 4, "flash_mha_bwd_dq": 3}
_LANES = 128  # of the matrix unit; narrower heads leave the others idle


class Figures(NamedTuple):
  """Of one device; what is in a loop is counted once, except where it is said.

  Attributes:
    temporaries: bytes besides arguments and results.
    code: bytes of the program.
    flops: the compiler's count; it does not see into kernels.
    optimal_seconds: the compiler's estimate, kernels left out.
    kernel_flops: of attention kernels by their shapes, loops counted as often as they run.
    kernel_flops_padded: likewise, with heads as wide as the matrix unit.
    collectives: (kind, (number, bytes of the results)), likewise.
    compile_seconds: how long the compiler took.
  """

  temporaries: int
  code: int
  flops: float
  optimal_seconds: float
  kernel_flops: float
  kernel_flops_padded: float
  collectives: tuple[tuple[str, tuple[int, int]], ...]
  compile_seconds: float = 0.0


def read_figures(compiled: jax.stages.Compiled, loops: int = 1) -> Figures:
  """Figures of a compiled program.

  Args:
    loops: how often each loop runs.
  """
  memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
  text = compiled.as_text()
  kernels = list(find_kernels(text, loops))
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return Figures(
    temporaries=memory.temp_size_in_bytes + results,
    code=memory.generated_code_size_in_bytes,
    flops=costs["flops"],
    optimal_seconds=costs["optimal_seconds"],
    kernel_flops=sum(flops for flops, _ in kernels),
    kernel_flops_padded=sum(padded for _, padded in kernels),
    collectives=tuple(sorted(find_collectives(text, loops).items())),
  )


def find_collectives(text: str, loops: int = 1) -> dict[str, tuple[int, int]]:
  """Kind -> (number, bytes of the results) of one run of the program.

  >>> find_collectives('''ENTRY %main (x: f32[2]) -> f32[8] {
  ...   ROOT %y = f32[8]{0} all-gather(%x), dimensions={0}
  ... }''')
  {'all-gather': (1, 32)}
  """
  found: dict[str, tuple[int, int]] = {}
  for shape, operation, _, times in _instructions(text, loops):
    kind = operation.removesuffix("-start")
    if kind not in _COLLECTIVES:
      continue
    sizes = [_size(*each) for each in _ARRAY.findall(shape)]
    if operation != kind and kind != "all-reduce":  # then the operands stand before the results
      sizes = sizes[len(sizes) // 2 :] if kind == "all-gather" else sizes[1:2]
    number, total = found.get(kind, (0, 0))
    found[kind] = number + times, total + times * sum(sizes)
  return found


def find_kernels(text: str, loops: int = 1) -> Iterator[tuple[float, float]]:
  """FLOPs of each attention kernel, as they are and with heads as wide as the matrix unit."""
  for shape, operation, line, times in _instructions(text, loops):
    if operation != "custom-call" or 'custom_call_target="tpu_custom_call"' not in line:
      continue
    name = line.split("=")[0].strip().removeprefix("ROOT ").removeprefix("%")
    products = next((n for kind, n in _KERNELS.items() if name.startswith(kind)), None)
    if products is None:
      raise ValueError(f"plan: kernel {name!r} is not known; its FLOPs cannot be counted")
    batch, heads, tokens, width = map(int, _ARRAY.findall(shape)[0][1].split(","))
    flops = 2.0 * times * products * batch * heads * tokens**2
    yield flops * width, flops * max(width, _LANES)


def needed_bytes(message: str) -> float | None:
  """What a program would take of a chip's memory, from the compiler's refusal; None: not said.

  >>> needed_bytes("Ran out of memory. Used 20.50G of 15.75G hbm. Exceeded by 4.75G.") / 2**30
  20.5
  >>> needed_bytes("required for HLO temporaries (15.50G) exceeds available HBM (15.75G)") / 2**30
  15.5
  """
  match = re.search(r"Used ([\d.]+)([KMGT]) of", message)
  match = match or re.search(r"\(([\d.]+)([KMGT])\) exceeds available", message)
  if match is None:
    return None
  return float(match[1]) * 2.0 ** (10 * (1 + "KMGT".index(match[2])))


def _instructions(text: str, loops: int) -> Iterator[tuple[str, str, str, int]]:
  """(shape, operation, line, how often it runs) of every instruction."""
  looped = _in_loops(text) if loops > 1 else set()
  times = 1
  for line in text.splitlines():
    header = _COMPUTATION.match(line)
    if header:
      times = loops if header[1] in looped else 1
      continue
    match = _INSTRUCTION.match(line)
    if match:
      yield match[1], match[2], line, times


def _in_loops(text: str) -> set[str]:
  """Names of the computations that a loop runs."""
  calls: dict[str, set[str]] = {}
  bodies, current = set(), ""
  for line in text.splitlines():
    header = _COMPUTATION.match(line)
    if header:
      current = header[1]
      continue
    bodies.update(re.findall(r"body=%([\w.-]+)", line))
    called = re.findall(r"(?:body|condition|calls|to_apply)=%([\w.-]+)", line)
    calls.setdefault(current, set()).update(called)
  found, waiting = set(), list(bodies)
  while waiting:
    name = waiting.pop()
    if name not in found:
      found.add(name)
      waiting += calls.get(name, ())
  return found


def _size(kind: str, dimensions: str) -> int:
  return _BYTES.get(kind, 4) * math.prod(int(each) for each in dimensions.split(",") if each)
