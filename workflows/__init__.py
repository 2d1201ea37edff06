"""Recipes that run as they are."""
