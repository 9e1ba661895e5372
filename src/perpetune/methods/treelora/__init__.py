"""TreeLoRA: an adapter for each task, and a tree that finds the earlier tasks most similar to the present one."""
