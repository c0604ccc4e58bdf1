"""What a device keeps on disk: layout, encryption, migration."""
