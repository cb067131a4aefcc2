"""Attacks: one flat function per file, `attack(model, x, y, *, …) -> x_adv`."""
