"""Measures a machine with real steps: `bench` says what bounds a recipe, `plan` proposes one."""
