"""Studies as one page: plots, tables, pictures."""
