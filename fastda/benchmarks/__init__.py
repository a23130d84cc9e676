"""Benchmarks: the cases, what they are compared with, and how time and memory are taken.

`bench/` (pytest-benchmark) and `python -m fastda.benchmarks`, which writes one record, both use this package.
"""
