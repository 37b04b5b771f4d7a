"""tqdm: a decoder whose queries are the classes' names, read beside the image."""
