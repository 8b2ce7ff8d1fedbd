"""dupr: unlabelled images to backbone weights that make an object detector better.

Four stages, each a package with a `run` function and each useful alone, meet only in the
artifacts they write and read (docs/formats.md): prepare, pretrain, export, evaluate.
docs/architecture.md shows the whole on one page.
"""

__version__ = "0.2.0"
