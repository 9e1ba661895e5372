"""Pretrained models, and what is added to them to answer."""
