"""TreeLoRA: an adapter for each task, and a tree that finds the earlier tasks that resemble the one at hand."""
