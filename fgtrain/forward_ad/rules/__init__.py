"""What a derivative of each function is, for the engines.

`operations`, `layers`, `losses` and `matrix_products` hold rules for stacked duals; `sampling`, `sequence` and
`written_out` hold functions written out in others, for every engine; `opened` and `fallbacks` deal with the rest.
"""
