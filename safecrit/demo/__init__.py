"""The demo's make-believe language, the models made on the spot from it, and every number of the recipe."""
