"""Detectors in two stages: proposals, then heads that look at each."""
