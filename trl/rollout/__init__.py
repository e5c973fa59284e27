"""A model to tokens, and tokens to rewards. Nothing here is scored for training: the trainer asks the engine."""
