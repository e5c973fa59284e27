"""Ready-made reward functions. Each takes lists of prompts and completions and gives a list of numbers."""
