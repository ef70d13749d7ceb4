"""Measurements: `run.py` and `graph_check.py` take them, `report.py` makes tables of them."""
