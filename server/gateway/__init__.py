"""The gateway: the only port of a federation's server that devices can reach."""
