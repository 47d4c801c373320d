"""What train.py stands on: options, the folder of a run, data and caches."""
