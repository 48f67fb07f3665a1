"""Recipes that train networks from nothing, one per file."""
