"""Noise at the outputs of layers instead of in their weights, and gradients estimated with it.

`noise` perturbs outputs in a pass. `layers` finds the layers that can be perturbed, `rows` assigns the rows of an
output to examples. `second_pass` redraws the noise instead of storing it. `closed_forms` gives the gradients of layers
that need no noise.
"""
