"""How the shipped testbed was made: data, training, verification."""
