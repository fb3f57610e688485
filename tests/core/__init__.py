"""Tests of softrag."""
