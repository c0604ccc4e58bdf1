"""Peak memory, predicted and measured."""
