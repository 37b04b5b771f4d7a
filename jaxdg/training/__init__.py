"""Batches to parameters: optimiser, sharding, the step, checkpoints, metrics.

Knows no model and no dataset.
"""
