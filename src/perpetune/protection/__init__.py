"""Protection of old answers: it keeps the optimizer's updates out of the directions that old features use.

`sites` finds the places where features meet trained parameters, and `memory` stores what is known of each place.
`protection` joins them for the method of a recipe, and `dropin` for any other training loop.
"""
