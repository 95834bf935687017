"""Rewards' own classes at a tiny size with random weights, saved as published ones are: for tests and tiny twins."""
