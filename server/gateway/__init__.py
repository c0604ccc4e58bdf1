"""The one port of a federation's server: what devices, enrolled or not, can reach of it."""
