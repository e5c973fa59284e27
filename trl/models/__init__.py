"""Loads and wraps weights."""
