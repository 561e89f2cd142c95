"""Benchmarks and the truth table: the same inputs for every provider, correct first."""
