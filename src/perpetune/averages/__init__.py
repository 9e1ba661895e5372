"""Averages of trained pets over the steps of a task (EMA): LAE, arXiv:2303.10070, and LLaCA, arXiv:2410.10868.

`config` is the section `average:` of a recipe. `average` follows the optimizers of a method and gives its answers.
"""
