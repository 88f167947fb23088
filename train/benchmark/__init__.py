"""Benchmark of the memory and time of every mixer and model: ``python -m train.benchmark``.

Each row is measured in its own process. The processes of a group (one sequence length or one image
size) are interleaved, so that a slow minute of the machine affects all of them alike.
"""
