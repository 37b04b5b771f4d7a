"""The paper's analyses: each compares several training runs, and the report shows them."""
