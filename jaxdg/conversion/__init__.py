"""Checkpoints of others to jaxdg's files and back: the mapping engine, readers of files, one table
a family.
"""
