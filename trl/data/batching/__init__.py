"""Tokens to batches: packing, the order of rows, trees, collators."""
