"""One file a method, over `base.py`, which alone touches `transformers.Trainer`."""
