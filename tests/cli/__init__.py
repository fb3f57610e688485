"""Tests of the `softrag` command."""
