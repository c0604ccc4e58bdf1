"""The operator's process: SuperLink, gateway and runs, and where they keep their files."""
