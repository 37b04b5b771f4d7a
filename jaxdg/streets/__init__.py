"""Generated street scenes: the embedded default dataset."""
