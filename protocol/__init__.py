"""Messages between server and devices (device report, training plan, adapter update), and the strict codec."""
