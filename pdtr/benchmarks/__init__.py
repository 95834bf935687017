"""How good is it, by published rules? One file a protocol, each a :class:`pdtr.benchmarks.base.Benchmark`."""
