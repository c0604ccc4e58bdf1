"""The command line of everything: `anther simulate`, `anther serve`, `anther device run`, …"""
