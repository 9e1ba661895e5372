"""Functions of numbers and tensors. Nothing here knows models, tasks or files."""
