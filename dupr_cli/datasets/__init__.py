"""Labelled sets: one reader per layout, and the shared placement of pixels and boxes."""
