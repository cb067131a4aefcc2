"""Feint: defences that deceive gradients, the attacks that test them, and honest evaluations."""

__version__ = "0.1.0"
