"""Weights by name: published files are fetched, verified, converted and kept."""
