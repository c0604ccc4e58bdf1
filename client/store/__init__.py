"""A device's storage: layout, encryption, migration."""
