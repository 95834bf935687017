"""What is asked? Prompts, source images, episodes and the embedded world."""
