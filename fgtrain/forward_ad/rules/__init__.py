"""The derivatives of functions, for the engines.

`short`, `arithmetic`, `operations`, `layers`, `losses`, `matrix_products` and `last_direction` hold rules for stacked
duals. `compositions`, `sampling` and `sequence` replace functions by compositions of others, for every engine.
`opened`, `per_direction` and `fallbacks` handle all other functions.
"""
