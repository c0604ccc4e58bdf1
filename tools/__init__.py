"""Generators of documentation and checks of the repository; not part of the wheel."""
