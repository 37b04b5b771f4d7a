"""The two tasks, what a run is built of, and `jaxdg.load`."""
