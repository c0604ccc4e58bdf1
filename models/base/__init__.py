"""The frozen base: files, loading, hashes, and the network that jobs share."""
