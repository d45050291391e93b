"""Noise at the outputs of layers instead of in their weights, and the gradients that follow from it.

`noise` perturbs outputs in a pass. `layers` finds which layers can be perturbed, `rows` which rows of an output belong
to which example. `second_pass` draws the noise again instead of keeping it.
"""
