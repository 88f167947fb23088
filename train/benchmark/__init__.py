"""What each mixer and each model costs in memory and time: ``python -m train.benchmark``.

Every row is measured in a process of its own. The processes of a group (one length, or one size of
image) take turns, so that a slow minute hits them all.
"""
