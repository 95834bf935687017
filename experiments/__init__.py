"""Which run: the command line, the recipes, the benchmarks and their committed results."""
