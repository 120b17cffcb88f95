"""The paper again: its tables, its figures, its benchmarks."""
