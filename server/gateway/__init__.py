"""The one port of a federation's server: everything that devices can reach."""
