"""Older words for what is here: arguments, values, hooks, attributes and import paths of upstream."""
