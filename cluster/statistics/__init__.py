"""Statistics that decide: which of two models is better, and whether data has changed."""
