"""Training of classifiers, with ACE in front or against an adversary, by committed recipes."""
