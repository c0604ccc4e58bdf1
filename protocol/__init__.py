"""What crosses the wire: device report, training plan, adapter update, and the strict codec."""
