"""Tests by package: `tests/methods` holds those of `unisd.methods`, and so on."""
