"""Programs of under twenty lines that adapt the digits of `fastda demo`: `python -m fastda.examples.dann`."""
