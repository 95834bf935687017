"""Online reinforcement-learning algorithms, one paper to a file."""
