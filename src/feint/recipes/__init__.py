"""Plans of runs: what the command line evaluates, and one recipe per published table."""
