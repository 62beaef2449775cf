"""Benchmarks: each prints its figure beside the peer's and writes JSON for `bench/results`."""
