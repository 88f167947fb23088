"""The programs: training, the demo, benchmarks. Run from a checkout as ``python -m train``."""
