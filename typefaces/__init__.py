"""The embedded default world: each writer is a device with a few pictures of letters in one hand."""
