"""Pictures for people: overlays, panels, legends."""
