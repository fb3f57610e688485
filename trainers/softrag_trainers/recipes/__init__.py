"""Shipped values of the options, one file for each recipe and stage."""
