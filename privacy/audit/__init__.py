"""Empirical audits: lower bounds of ε, tests of noise, membership inference."""
