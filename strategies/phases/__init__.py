"""Phases of a round: each makes requests, and turns the replies into a result."""
