"""Pages of what was run: what they consist of, their plots and pictures, and a run's own page."""
