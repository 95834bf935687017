"""What is good: callables that score images and know no policy and no environment."""
