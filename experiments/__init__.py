"""Measurements, comparisons and ablations: `python -m experiments NAME`. Nothing imports these."""
