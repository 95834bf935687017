"""What does a vision-language model think of it? Judges behind any OpenAI-compatible server, as rewards."""
