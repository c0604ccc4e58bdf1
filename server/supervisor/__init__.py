"""The supervisor: starts SuperLink, gateway and runs, and lays out their files."""
