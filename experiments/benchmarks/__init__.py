"""Benchmarks: scripts that measure what the documentation claims."""
