"""Flow-matching policies, one backbone to a file."""
