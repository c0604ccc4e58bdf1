"""Loss and quality of adapters by strategy, fleet, precision and traffic."""
