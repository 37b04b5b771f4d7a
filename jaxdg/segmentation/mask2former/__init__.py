"""The Mask2Former decoder."""
