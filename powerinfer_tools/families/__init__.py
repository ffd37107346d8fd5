"""The families of models that are understood: one file each, which says how their checkpoints are read.

To add one, add a file that sets FAMILY; nothing else names it.
"""
