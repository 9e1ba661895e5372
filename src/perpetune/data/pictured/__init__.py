"""Texts with pictures in them: where they are read from, and how they become what a model reads."""
