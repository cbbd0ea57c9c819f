"""Boards: run and measure compiled models on other machines."""
