"""Guessing tokens ahead, so that one step can yield several: who guesses, how many, and which were right."""
