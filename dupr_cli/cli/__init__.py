"""The command line: one module per subcommand. Options in, stage called, result shown; no logic.

Nothing here imports torch when it is imported: `dupr --help` must answer at once. Each command
imports its stage when it runs.
"""
