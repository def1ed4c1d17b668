"""Measuring quality: metrics (one family a file), diagnostics, grids, inference, the report page.

Nothing here trains. `stages.py` holds the two stage entry points, `inference.py` what the command
line offers on finished stages. Every number carries its protocol (N, feature extractor, sampler,
seeds) in `metrics.json`.
"""
