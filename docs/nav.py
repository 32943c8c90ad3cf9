"""The site's navigation: known pages in the order in which they are read, others at its end.

A hook of mkdocs.yml, so that a new page is never missing: strict builds refuse one that is.
"""

import pathlib

ORDER = {
  "Understand": ("concepts", "methods", "mode_seeking", "study"),
  "Data": ("own_pairs", "pick_a_pic", "encoding"),
  "Run": ("launch_local", "launch_tpu_vm", "launch_gke", "launch_slurm", "plan"),
  "Watch": ("watching", "reliability"),
  "Measure": ("scorers", "evaluation"),
  "Trust": ("security",),
}


def pages(folder: pathlib.Path) -> list:
  """The nav of MkDocs for the pages of a folder; their titles are their own first headings."""
  left = {path.stem for path in folder.glob("*.md")} - {"index"}
  nav: list = [{"Home": "index.md"}]
  for section, names in ORDER.items():
    found = [name for name in names if name in left]
    left -= set(found)
    if found:
      nav.append({section: [f"{name}.md" for name in found]})
  if left:
    nav.append({"More": [f"{name}.md" for name in sorted(left)]})
  return nav


def on_config(config):
  """Called by the generator before it looks at any file."""
  config.nav = pages(pathlib.Path(config.docs_dir))
  return config
