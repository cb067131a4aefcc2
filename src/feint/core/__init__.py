"""Tensors and contracts only: everything else stands on this room, and it stands on torch."""
