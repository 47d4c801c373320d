"""Support for train.py: options, the folder of a run, data and caches."""
