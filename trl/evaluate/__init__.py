"""How good a model is on a data set, each number with its confidence interval."""
