"""Pure functions: tensors in, per-item losses and metrics out. Nothing here knows a model or a layout."""
