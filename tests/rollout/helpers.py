"""What the tests of samplers share."""


def sample(sampler, model, requests, sampling):
    """Completions of the requests by this model."""
    sampler.sync(model, 0)
    return sampler.generate(requests, sampling)
