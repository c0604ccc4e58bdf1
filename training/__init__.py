"""Local training in slots: torch only, no flwr."""
