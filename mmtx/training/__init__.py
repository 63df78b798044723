"""Training with Lightning; nothing outside of this package imports it."""
