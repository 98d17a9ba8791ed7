"""Perplexity from the mean negative log-likelihood: one rule for what is measured and what is compared."""

from math import exp

# exp of more overflows a float; a model that far gone is broken, whatever the figure.
_LARGEST = 700.0


def perplexity_of(nll: float) -> float:
    """exp of the mean negative log-likelihood in nats a token, kept finite."""
    return exp(min(nll, _LARGEST))
