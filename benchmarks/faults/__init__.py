"""A campaign of faults against training runs: `python -m benchmarks.faults`."""
