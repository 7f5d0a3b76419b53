"""The model as a method sees it: loading, generation, decoding."""
