"""What weaver-rl costs, measured: `python -m benchmarks`. The product does not import it."""
