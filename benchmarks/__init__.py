"""Benchmarks: families of cases and variants, an accuracy gate before every timing, and a report."""
