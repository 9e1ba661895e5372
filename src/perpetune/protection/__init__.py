"""Protection of old answers: updates are kept out of the directions that old features use.

`sites` finds where features meet trained parameters, `memory` holds what is kept of each site, `protection` puts
them together for a recipe's method, and `dropin` for anybody's own training loop.
"""
