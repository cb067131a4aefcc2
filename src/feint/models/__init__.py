"""Classifiers: architectures, normalisation inside the model, loaders by spec, bundled weights."""
