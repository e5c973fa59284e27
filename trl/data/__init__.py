"""Rows to tokens and masks. Nothing here needs a model or a GPU, and the same rows always give the same tokens."""
