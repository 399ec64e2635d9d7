"""A real training job that is killed in the middle of a save and comes back bit for bit.

``train.py`` is the example of how a job adopts dcpsvc; ``run.py`` launches it, kills it, and compares.
"""
