"""Faster attention, linear maps and memory; they change time and memory only."""
