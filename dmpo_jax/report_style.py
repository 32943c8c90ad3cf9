"""Colours that the report's page and its figures share, and the page's style sheet."""

from typing import NamedTuple


class Palette(NamedTuple):
  """Colours of one theme, as CSS hex. Policy and reference keep theirs in every figure."""

  page: str
  raised: str
  ink: str
  muted: str
  line: str
  reference: str
  policy: str
  validation: str
  better: str
  worse: str


LIGHT = Palette(
  page="#fdfdfb",
  raised="#f5f5f1",
  ink="#1c1d1f",
  muted="#62656b",
  line="#e1e1db",
  reference="#8d9097",
  policy="#2f5fd0",
  validation="#d9761a",
  better="#1f8a55",
  worse="#cc4030",
)
DARK = Palette(
  page="#131417",
  raised="#1b1d21",
  ink="#e9e9e5",
  muted="#9ca0a8",
  line="#2d3036",
  reference="#858a93",
  policy="#7ea6ff",
  validation="#f0a04b",
  better="#3fb57c",
  worse="#f0705a",
)
THEMES = {"light": LIGHT, "dark": DARK}


def style_sheet() -> str:
  """The page's CSS: both themes, no outside font or file."""
  return f"{variables()}\n{_RULES}"


def variables() -> str:
  """The colours of both themes as CSS variables, one for each field of `Palette`."""
  return f":root{{color-scheme:light dark;{_variables(LIGHT)}}}\n" + (
    f"@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
  )


def _variables(palette: Palette) -> str:
  return "".join(f"--{name}:{colour};" for name, colour in palette._asdict().items())


_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
  font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:56px 28px 72px}
h1,h2{font-family:Charter,"Bitstream Charter","Iowan Old Style",Palatino,Georgia,serif;
  font-weight:600;letter-spacing:-.01em;line-height:1.2;text-wrap:balance}
h1{font-size:2.3rem;margin:0 0 20px}
h2{font-size:1.45rem;margin:68px 0 6px;padding-top:20px;border-top:1px solid var(--line)}
h3{font-size:.95rem;font-weight:600;margin:26px 0 10px}
p{max-width:70ch;margin:0 0 14px}
.lede{font-size:1.2rem;line-height:1.55;max-width:74ch}
.note{color:var(--muted);font-size:.9rem;line-height:1.55}
.after{margin-top:16px}
.verdicts{display:grid;gap:14px;margin:14px 0 22px}
.verdict{border-left:3px solid var(--validation);padding-left:14px}
.verdict.error{border-color:var(--worse)}
.verdict.good{border-color:var(--better)}
.verdict p{margin:0 0 4px}
img{display:block;max-width:100%;height:auto}
a{color:inherit;text-decoration-color:var(--reference);text-underline-offset:2px}
.num,td,dd{font-variant-numeric:tabular-nums}

.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:1px;margin:32px 0 28px;
  background:var(--line);border:1px solid var(--line);border-radius:8px;overflow:hidden}
.tile{background:var(--page);padding:16px 18px 14px}
.tile b{display:block;font-size:1.6rem;line-height:1.25;font-weight:600;letter-spacing:-.02em;
  font-variant-numeric:tabular-nums;white-space:nowrap}
.was{color:var(--muted);font-weight:400;font-style:normal}
.tile span{display:block;font-size:.85rem;color:var(--muted);line-height:1.45}
.tile .what{color:var(--ink);margin-bottom:2px}

.grids{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,470px),1fr));
  gap:30px 40px;margin-top:24px}
figure{margin:0;min-width:0}
.prompt{display:flex;align-items:baseline;gap:10px;margin:0 0 7px}
.prompt b{font-size:1.05rem;overflow-wrap:anywhere}
.prompt small{color:var(--muted);font-size:.8rem;white-space:nowrap}
.strip{display:grid;grid-template-columns:4.3rem 1fr;align-items:stretch;margin-bottom:8px}
.sides{display:grid;grid-template-rows:1fr 1fr;align-items:center;font-size:.8rem;
  line-height:1;color:var(--muted)}
.sides :last-child{color:var(--policy);font-weight:600}
.key{display:inline-block;width:0;height:0;border:5.5px solid transparent;margin:0 2px -1px 4px}
.key.better{border-top-color:var(--better);border-right-color:var(--better)}
.key.worse{border-bottom-color:var(--worse);border-right-color:var(--worse)}

.shifts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));
  gap:34px 44px;margin-top:24px}
.shift{display:grid;grid-template-columns:30px 1fr auto;gap:9px 11px;align-items:center}
.shift img{width:30px;height:30px;border-radius:4px;border:1px solid var(--line);background:#fff}
.shift .name{display:flex;justify-content:space-between;gap:8px;font-size:.8rem;line-height:1.3}
.shift .name span{overflow-wrap:anywhere}
.shift .name small{color:var(--muted);font-size:.75rem;white-space:nowrap}
.bar{height:5px;margin-top:3px;border-radius:1px;background:var(--raised)}
.bar i{display:block;height:100%;border-radius:1px}
.bar .reference,.swatch.reference{background:var(--reference)}
.bar .policy,.swatch.policy{background:var(--policy)}
.shift .pair{font-size:.75rem;line-height:1.25;text-align:right;color:var(--muted);
  font-variant-numeric:tabular-nums;min-width:3.2em}
.shift .pair b{display:block;color:var(--policy);font-weight:600}
.swatch{display:inline-block;width:.75em;height:.75em;border-radius:2px;margin:0 .1em 0 .5em}

.scroll{overflow-x:auto;margin:20px 0 14px}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{text-align:right;padding:9px 12px;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:500;color:var(--muted);font-size:.82rem}
th:first-child,td:first-child{text-align:left;padding-left:0;color:var(--ink)}
tbody th{font-size:.92rem}
td small{color:var(--muted);font-size:.82rem;margin-left:5px}
td.forest{width:30%;min-width:170px;padding-right:0}
.axis{position:relative;height:22px;
  background:linear-gradient(var(--line),var(--line)) 0 50%/100% 1px no-repeat}
.axis i{position:absolute;height:3px;border-radius:2px;margin-top:-1.5px;min-width:2px}
.axis u{position:absolute;width:8px;height:8px;border-radius:50%;margin:-4px 0 0 -4px}
.axis .reference{background:var(--reference);top:7px}
.axis .policy{background:var(--policy);top:15px}
.axis s{position:absolute;top:1px;bottom:1px;border-left:1px dashed var(--muted)}

.panels{display:grid;grid-template-columns:repeat(3,1fr);gap:26px 28px;margin-top:22px}
.two{display:grid;grid-template-columns:repeat(2,1fr);gap:26px 36px;margin-top:22px}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:18px 24px;
  margin:22px 0 26px}
.facts dt{font-size:.82rem;color:var(--muted)}
.facts dd{margin:0;overflow-wrap:anywhere}
pre{background:var(--raised);border:1px solid var(--line);border-radius:6px;padding:13px 16px;
  font:.82rem/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
  white-space:pre-wrap;overflow-wrap:anywhere;margin:10px 0 18px}
details{border-top:1px solid var(--line);padding:10px 0}
details:last-of-type{border-bottom:1px solid var(--line)}
summary{cursor:pointer;font-weight:500}
.settings{columns:2;column-gap:48px;font-size:.82rem;margin:12px 0}
.settings div{display:flex;justify-content:space-between;gap:16px;break-inside:avoid;
  border-bottom:1px solid var(--line);padding:3px 0}
.settings dt{color:var(--muted);overflow-wrap:anywhere}
.settings dd{margin:0;text-align:right;overflow-wrap:anywhere}
footer{margin-top:60px;padding-top:18px;border-top:1px solid var(--line)}

@media (max-width:900px){.panels{grid-template-columns:repeat(2,1fr)}}
@media (max-width:680px){
  main{padding:30px 18px 48px}
  h1{font-size:1.75rem}h2{margin-top:50px;font-size:1.3rem}
  .lede{font-size:1.07rem}
  .tiles{grid-template-columns:repeat(2,1fr)}
  .tile{padding:12px 14px}.tile b{font-size:1.3rem}
  .panels,.two{grid-template-columns:1fr}
  .strip{grid-template-columns:1fr}.sides{display:none}
  .settings{columns:1}
  td small{display:block;margin:0}
  th,td{padding:8px 8px}
  td.forest,th.forest{display:none}
}
@media print{main{max-width:none;padding:0}figure,.shift{break-inside:avoid}}
"""
