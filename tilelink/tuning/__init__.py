"""Tuning: problems, predictions, measurements, and the tables that come of them.

What is searched, and how, is in :mod:`tilelink.schedules` (`space`, `search`, `tables`), which measures
nothing. Here is what compiles and runs: `predict` asks the virtual clock, `measure` the GPUs.
"""
