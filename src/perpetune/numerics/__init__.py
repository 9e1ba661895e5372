"""Numbers and tensors in, numbers and tensors out; knows no model, task or file."""
