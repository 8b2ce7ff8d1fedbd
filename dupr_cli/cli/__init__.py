"""The command line: each module parses the options of a subcommand and calls its stage.

Modules here do not import torch at import time, because `dupr --help` must answer at once. Each
command imports its stage when it runs.
"""
