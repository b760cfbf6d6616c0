"""All layers together: rank and null space of the Jacobian of the update.

By elimination along the chain, or by a sketch.
"""
