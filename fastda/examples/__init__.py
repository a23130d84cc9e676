"""Programs of under twenty lines, each of which adapts the digits of `fastda demo`: `python -m fastda.examples.dann`."""
