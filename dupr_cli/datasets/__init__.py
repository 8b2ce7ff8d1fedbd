"""Labelled sets: readers of each layout, and the one placement of pixels and boxes."""
