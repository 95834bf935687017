"""Published pipelines' own classes at a tiny size with random weights: for tests and trial runs without a download."""
